"""Kernel distance of two sets of features, without bias, hence for few pictures too (Binkowski et al. 2018)."""

import numpy as np
from jaxtyping import Float

BLOCK = 1024  # rows of a kernel matrix that exist at once


def kernel_distance(x: Float[np.ndarray, "n D"], y: Float[np.ndarray, "m D"]) -> float:
    """Squared maximum mean discrepancy with the kernel (x . y / D + 1)^3 (arXiv:1801.01401, section 4: the KID).

    The unbiased estimate over all pairs: about 0, and possibly below, for sets of one distribution. KID is often given
    times 1,000. Both sets need two rows.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    within = sum((_kernel_sum(z, z) - _diagonal_sum(z)) / (len(z) * (len(z) - 1)) for z in (x, y))
    return float(within - 2 * _kernel_sum(x, y) / (len(x) * len(y)))


def _kernel_sum(x: Float[np.ndarray, "n D"], y: Float[np.ndarray, "m D"]) -> float:
    return sum(((x[i : i + BLOCK] @ y.T / x.shape[1] + 1) ** 3).sum() for i in range(0, len(x), BLOCK))


def _diagonal_sum(x: Float[np.ndarray, "n D"]) -> float:
    return (((x * x).sum(1) / x.shape[1] + 1) ** 3).sum()
