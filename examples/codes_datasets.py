"""Reads a tokenized dataset of parquet shards with Hugging Face `datasets`.

python examples/codes_datasets.py /data/codes
"""

import argparse
import json
import pathlib

import datasets

from vqrae_jax.errors import report_errors


def load(path: str) -> datasets.Dataset:
    """Loads the columns index, id, label and codes, the codes in their shape."""
    shape = tuple(json.loads((pathlib.Path(path) / "manifest.json").read_text())["code_shape"])
    flat = datasets.load_dataset("parquet", data_files=str(pathlib.Path(path) / "*.parquet"), split="train")
    flat = flat.with_format("numpy")
    return flat.map(lambda row: {"codes": row["codes"].reshape(shape)}) if len(shape) > 1 else flat


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codes", help="folder that vqrae tokenize has written")
    args = parser.parse_args()
    with report_errors():
        records = load(args.codes)
        print(records, records[0]["codes"].shape)
