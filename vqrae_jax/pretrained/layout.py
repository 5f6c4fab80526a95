"""Layout of single arrays in PyTorch files and in our trees; the parameter's path determines it."""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np


def file_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the PyTorch shape of the parameter at `path`, which has `shape` in our tree.

    PyTorch's linear layers are (out, in), ours are (in, out) with the attention heads unfolded. Its convolutions are
    (out, in, *window), ours (*window, in, out). Its patch embedding is a convolution (out, in, row, column), ours a
    matrix (row * column * in, out).
    """
    if _is_convolution(path):
        return (*shape[:-3:-1], *shape[:-2])
    if path.endswith("patch_embed/kernel"):
        side = math.isqrt(shape[0] // 3)
        return (shape[1], 3, side, side)
    if path.endswith("attn/out/kernel"):
        return (shape[-1], math.prod(shape[:-1]))
    if path.endswith("/kernel"):
        return (math.prod(shape[1:]), shape[0])
    return (math.prod(shape),) if path.endswith("/bias") else shape


def from_file(path: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the file's tensor as float32 of `shape`; raises ValueError if shapes differ in more than axes of one."""
    expected = file_shape(path, shape)
    if [n for n in tensor.shape if n != 1] != [n for n in expected if n != 1]:
        raise ValueError(f"{tuple(tensor.shape)} in the file, {expected} expected for {path}")
    if _is_convolution(path):
        tensor = np.moveaxis(tensor.reshape(expected), (1, 0), (-2, -1))
    elif path.endswith("/kernel"):
        tensor = tensor.reshape(expected).transpose((2, 3, 1, 0) if len(expected) == 4 else (1, 0))
    # Many results are transposed views; a copy lets the memory of the file be freed.
    return np.array(tensor.reshape(shape), dtype=np.float32, order="C", copy=True)


def to_file(path: str, array: np.ndarray) -> np.ndarray:
    """Returns our array in the layout of PyTorch; the inverse of `from_file`."""
    expected = file_shape(path, array.shape)
    if _is_convolution(path):
        return np.ascontiguousarray(np.moveaxis(array, (-2, -1), (1, 0)))
    if not path.endswith("/kernel"):
        return np.asarray(array.reshape(expected), order="C")
    if len(expected) == 4:
        out, channels, side, _ = expected
        return np.ascontiguousarray(array.reshape(side, side, channels, out).transpose(3, 2, 0, 1))
    return np.ascontiguousarray(array.reshape(expected[::-1]).T)


def _is_convolution(path: str) -> bool:
    return re.search(r"conv\w*/kernel$", path) is not None


def unstack_blocks(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Splits arrays stacked over blocks into views: `blocks/a` [L, ...] becomes `block00/a`, `block01/a`, ..."""
    single = {}
    for path, array in flat.items():
        if match := re.match(r"(.*/)?blocks/(.*)", path):
            single |= {f"{match[1] or ''}block{i:02d}/{match[2]}": array[i] for i in range(len(array))}
        else:
            single[path] = array
    return single
