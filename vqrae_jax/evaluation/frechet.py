"""Frechet distance of two sets of features, seen as Gaussians (Heusel et al. 2017, arXiv:1706.08500, equation 6)."""

import numpy as np
from jaxtyping import Float


def frechet_distance(
    mean: Float[np.ndarray, " D"],
    covariance: Float[np.ndarray, "D D"],
    other_mean: Float[np.ndarray, " D"],
    other_covariance: Float[np.ndarray, "D D"],
) -> float:
    """|m - m'|^2 + tr(S + S' - 2 (S S')^1/2), at least 0.

    The trace of the root is the sum of the singular values of S^1/2 S'^1/2, so that only symmetric matrices have to be
    decomposed; it is real, and exact for covariances without full rank too.
    """
    cross = _root(covariance) @ _root(other_covariance)
    shared = np.linalg.svd(cross, compute_uv=False).sum()
    difference = np.asarray(mean, np.float64) - other_mean
    distance = difference @ difference + np.trace(covariance) + np.trace(other_covariance) - 2 * shared
    return max(float(distance), 0.0)


def _root(covariance: Float[np.ndarray, "D D"]) -> Float[np.ndarray, "D D"]:
    values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))
    noise = len(values) * np.finfo(np.float64).eps * values[-1]
    return vectors * np.sqrt(np.where(values > noise, values, 0)) @ vectors.T
