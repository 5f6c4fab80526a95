"""PyTorch's image resampling as one small matrix per axis, for pixels, position grids and latents.

`jax.image.resize` has another cubic constant and antialiases, which changes encoder features by several percent.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

AnyArray = Array | np.ndarray
Method = Literal["bilinear", "bilinear_tf1", "bicubic", "bicubic_antialias"]


def resize(x: Float[AnyArray, "*b H W C"], height: int, width: int, method: Method) -> Float[AnyArray, "*b h w C"]:
    """Resamples the axes H and W to (height, width), in float32.

    "bilinear" and "bicubic" (a = -0.75) equal torch's interpolate(align_corners=False); "bicubic_antialias" (a = -0.5,
    kernel widened when shrinking) equals it with antialias=True. "bilinear_tf1" is TensorFlow 1's
    resize_bilinear(align_corners=False), which Inception's features are defined by: sample i lies at i * n_in / n_out.
    """
    if x.shape[-3:-1] == (height, width):
        return x
    rows = matrix(x.shape[-3], height, method)
    columns = matrix(x.shape[-2], width, method)
    out = jnp.einsum("hH,...HWC,wW->...hwC", rows, x.astype(jnp.float32), columns, precision=jax.lax.Precision.HIGHEST)
    return out.astype(x.dtype)


def matrix(n_in: int, n_out: int, method: Method) -> Float[np.ndarray, "out in"]:
    """Returns the weights that resample n_in samples to n_out; every row sums to one."""
    if method == "bicubic_antialias":
        return antialiased_matrix(n_in, n_out, slice(None))
    kernel, taps = (_cubic, range(-1, 3)) if method == "bicubic" else (_triangle, range(2))
    shift = 0.0 if method == "bilinear_tf1" else 0.5
    centre = (np.arange(n_out) + shift) * (n_in / n_out) - shift
    if method == "bilinear":
        centre = np.maximum(centre, 0)  # torch clamps the source coordinate of linear modes at the first sample
    first = np.floor(centre).astype(int)
    weights = np.zeros((n_out, n_in))
    for tap in taps:
        source = first + tap
        np.add.at(weights, (np.arange(n_out), np.clip(source, 0, n_in - 1)), kernel(centre - source))
    return weights.astype(np.float32)


def antialiased_matrix(n_in: int, n_out: int, rows: slice) -> Float[np.ndarray, "rows in"]:
    """Returns rows of `matrix` for bicubic_antialias: taps outside the image are dropped, the others renormalized."""
    step = n_in / n_out
    stretch = max(step, 1.0)
    centre = (np.array(range(n_out)[rows]) + 0.5) * step
    first = np.maximum((centre - 2 * stretch + 0.5).astype(int), 0)
    last = np.minimum((centre + 2 * stretch + 0.5).astype(int), n_in)
    source = np.arange(n_in)
    weights = _cubic((source + 0.5 - centre[:, None]) / stretch, a=-0.5)
    weights *= (source >= first[:, None]) & (source < last[:, None])
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _triangle(distance: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(distance), 0)


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Returns Keys' cubic convolution kernel (IEEE ASSP 29(6), 1981)."""
    d = np.abs(distance)
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0))
