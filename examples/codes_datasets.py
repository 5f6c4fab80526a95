"""Reads a tokenized dataset of parquet shards with Hugging Face `datasets`.

python examples/codes_datasets.py /data/codes
"""

import json
import pathlib
import sys

import datasets


def load(path: str) -> datasets.Dataset:
    """Loads the columns index, id, label and codes, the codes in their shape."""
    shape = tuple(json.loads((pathlib.Path(path) / "manifest.json").read_text())["code_shape"])
    flat = datasets.load_dataset("parquet", data_files=str(pathlib.Path(path) / "*.parquet"), split="train")
    flat = flat.with_format("numpy")
    return flat.map(lambda row: {"codes": row["codes"].reshape(shape)}) if len(shape) > 1 else flat


if __name__ == "__main__":
    records = load(sys.argv[1])
    print(records, records[0]["codes"].shape)
