"""Frechet distance of two sets of features, seen as Gaussians (Heusel et al. 2017, arXiv:1706.08500, equation 6)."""

import numpy as np
from jaxtyping import Float

from vqrae_jax.evaluation.moments import Gaussian


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """|m - m'|^2 + tr(S + S' - 2 (S S')^1/2), at least 0.

    With S = F F^T and S' = F' F'^T the trace of the root is the sum of the singular values of F^T F', so that only
    symmetric matrices have to be decomposed; it is real, and exact for covariances without full rank too.
    """
    shared = np.linalg.svd(_factor(one.covariance).T @ _factor(other.covariance), compute_uv=False).sum()
    apart = np.asarray(one.mean, np.float64) - other.mean
    distance = apart @ apart + np.trace(one.covariance) + np.trace(other.covariance) - 2 * shared
    return max(float(distance), 0.0)


def _factor(covariance: Float[np.ndarray, "D D"]) -> Float[np.ndarray, "D rank"]:
    """F with F F^T = covariance, its columns the principal axes of positive variance."""
    values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))
    kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])
