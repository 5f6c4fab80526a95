"""Reads a tokenized dataset with PyTorch, without importing JAX.

python examples/codes_torch.py /data/codes
"""

import argparse
import sys

import numpy as np
import torch

from vqrae_jax.data.codes import Codes
from vqrae_jax.errors import report_errors


class CodeDataset(torch.utils.data.Dataset):
    """Pairs of codes, int64 [...], and label."""

    def __init__(self, path: str):
        self.records = Codes(path)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        record = self.records[index]
        return torch.from_numpy(record["codes"].astype(np.int64)), int(record["label"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codes", help="folder that vqrae tokenize has written")
    args = parser.parse_args()
    with report_errors():
        codes, labels = next(iter(torch.utils.data.DataLoader(CodeDataset(args.codes), batch_size=4, shuffle=True)))
        print(codes.shape, labels.tolist(), "jax imported:", "jax" in sys.modules)
