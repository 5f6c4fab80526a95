"""The codes of a tokenized dataset as a source of batches."""

import logging
import os
from typing import Any

import numpy as np

from vqrae_jax.data.codes import Codes
from vqrae_jax.data.source import Source
from vqrae_jax.errors import DataError

_log = logging.getLogger(__name__)


class CodeSource(Source):
    """The codes that `vqrae tokenize` has written, in memory.

    A record is {"codes": uint16 or int32 [views, *view_shape], "label": int32}, with label -1 without one. Opening
    reads the manifest only; `load`, or the first record, reads all shards and checks them.

    Attributes:
      plan: the manifest, with the hash of the tokenizer, `view_shape`, and the size of the codebook.
    """

    def __init__(self, path: str | os.PathLike, field: str = "data.path"):
        self._field, self._path, self._arrays = field, os.fspath(path), None
        try:
            self._codes = Codes(path)
        except DataError as error:
            raise DataError(str(error), field=field) from error
        if not len(self._codes):
            raise self._error("has no codes, as none of its images could be read")
        self.plan, self.classes = self._codes.plan, self._codes.plan.classes or None

    def __len__(self) -> int:
        return len(self._codes)

    def __getitem__(self, index: int | np.integer) -> dict[str, np.ndarray | np.integer]:
        codes, labels = self.load()._arrays
        return {"codes": codes[index], "label": labels[index]}

    def load(self, threads: int = 4) -> "CodeSource":
        """Reads all shards, unless they are in memory, with a number of threads; returns the source."""
        if self._arrays is None:
            codes, labels = self._codes.load(threads)
            _log.info("%r takes %.2f GB of memory", self, codes.nbytes / 1e9)
            low, high, stop = int(labels.min()), int(labels.max()), len(self.classes or ()) or 2**31
            if low < -1 or high >= stop:
                raise self._error(f"has labels from {low} to {high}, expected -1 or less than {stop} classes")
            self._arrays = codes.reshape(len(codes), -1, *self.plan.view_shape), labels
        return self

    @property
    def num_classes(self) -> int:
        """The number of classes that have names; without names, the largest label plus one."""
        return len(self.classes or ()) or 1 + int(self.load()._arrays[1].max())

    def check_labels(self, classes: int) -> None:
        """Raises DataError unless every image has a label in [0, classes)."""
        labels = self.load()._arrays[1]
        if missing := int((labels < 0).sum()):
            raise self._error(
                f"{missing} of {len(self)} images have no label, but labels are conditions; tokenize images in class "
                "folders, or with --label-key"
            )
        if (high := int(labels.max())) >= classes:
            raise self._error(f"has label {high}, expected less than {classes} classes")

    def check_same(self, other: "CodeSource") -> None:
        """Raises DataError if the codes have another tokenizer or other classes than those of another source."""
        if self.plan.tokenizer != other.plan.tokenizer:
            raise self._error(f"has codes of another tokenizer than {other!r}; tokenize both with the same one")
        if self.classes and other.classes and self.classes != other.classes:
            raise self._error(f"has other classes than {other!r}; tokenize again with --classes={other._path}")

    def fingerprint(self, count: int) -> bytes:
        return self._codes.digest.encode()

    def name(self, index: int) -> str:
        return f"{self._path!r}, record {index}"

    def _error(self, problem: str) -> DataError:
        return DataError(problem, field=self._field, value=self._path)

    def __repr__(self) -> str:
        return f"CodeSource({self._path!r}, images={len(self)}, code_shape={self.plan.code_shape})"


def choose_view(record: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Replaces the views of a record by a random one, int32 [*view_shape]."""
    codes = record["codes"]
    return record | {"codes": codes[rng.integers(len(codes))].astype(np.int32)}


class FirstViews:
    """The first views of a source in order, for evaluation; records after the end of the data have mask False."""

    def __init__(self, source: CodeSource, count: int, length: int):
        """`count`: number of images to use, the first ones; `length`: number of records, at least `count`."""
        self._source, self._count, self._length = source, count, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns {"codes": int32 [*view_shape], "label": int32, "mask": bool}."""
        if index < self._count:
            record = self._source[index]
            return record | {"codes": record["codes"][0].astype(np.int32), "mask": np.bool_(True)}
        codes = np.zeros(self._source.plan.view_shape, np.int32)
        return {"codes": codes, "label": np.int32(-1), "mask": np.bool_(False)}

    def __repr__(self) -> str:
        return f"FirstViews({self._source!r}, count={self._count}, length={self._length})"
