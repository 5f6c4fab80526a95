"""Reads a tokenized dataset with grain: shuffled batches of codes and labels, forever.

python examples/codes_grain.py /data/codes
"""

import argparse

import grain

from vqrae_jax.data.codes import Codes
from vqrae_jax.errors import report_errors

READING = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)  # in batches; grain's default reads 500 ahead


def batches(path: str, batch_size: int, seed: int = 0) -> grain.DatasetIterator:
    """Yields {"codes": [batch, ...], "label": int32 [batch]}; `get_state` and `set_state` resume it exactly."""
    records = grain.MapDataset.source(Codes(path)).seed(seed).shuffle().repeat()
    columns = records.map(lambda record: {name: record[name] for name in ("codes", "label")})
    return iter(columns.batch(batch_size, drop_remainder=True).to_iter_dataset(READING))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codes", help="folder that vqrae tokenize has written")
    args = parser.parse_args()
    with report_errors():
        batch = next(batches(args.codes, 4))
        print({name: (value.shape, value.dtype) for name, value in batch.items()})
