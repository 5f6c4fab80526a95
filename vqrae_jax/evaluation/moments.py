"""Mean and covariance of rows that arrive in batches, in any order and from any number of processes."""

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Gaussian(NamedTuple):
    """The statistics of a set of features from which a Frechet distance is computed."""

    mean: Float[np.ndarray, " D"]
    covariance: Float[np.ndarray, "D D"]
    count: int | None = None  # number of features they were estimated from, if that is known

    def digest(self) -> str:
        return hashlib.sha256(np.float64(self.mean).tobytes() + np.float64(self.covariance).tobytes()).hexdigest()


class Moments:
    """Count, mean and sum of products of deviations from the mean, in float64.

    Each batch is centred on its own mean before anything is multiplied, and merged by the difference of the means (Chan
    et al. 1983, doi:10.1080/00031305.1983.10483115). Nothing cancels, however far the mean is from zero.

    Attributes:
      count: number of rows.
      mean: their mean, of the shape of a row; a scalar 0 before the first row.
      products: [D, D], sums over rows of outer products of deviations. With `diagonal`, sums of squared deviations, of
        the shape of a row, which may then be of any rank.
    """

    def __init__(self, diagonal: bool = False):
        self.diagonal = diagonal
        self.count = 0
        self.mean = self.products = np.zeros(())

    def add(self, rows: Float[np.ndarray, "n ..."]) -> None:
        if not len(rows):
            return
        rows = np.asarray(rows, np.float64)
        mean = rows.mean(0)
        rows = rows - mean
        self.merge(len(rows), mean, (rows**2).sum(0) if self.diagonal else rows.T @ rows)

    def merge(self, count: int, mean: Float[np.ndarray, "*D"], products: Float[np.ndarray, "..."]) -> None:
        """Adds `count` rows of which mean and products are known."""
        if not count:
            return
        mean, products = np.asarray(mean, np.float64), np.asarray(products, np.float64)
        total = self.count + count
        delta = mean - self.mean
        between = delta**2 if self.diagonal else np.multiply.outer(delta, delta)
        self.products = self.products + products + self.count * count / total * between
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the state as arrays, for `merge_arrays` in another process."""
        return {"count": np.asarray(self.count), "mean": self.mean, "products": self.products}

    def merge_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.merge(int(arrays["count"]), arrays["mean"], arrays["products"])

    def gaussian(self) -> Gaussian:
        """Returns mean and covariance, normalized by count - 1 as `numpy.cov` does; needs at least two rows."""
        return Gaussian(self.mean, self.products / (self.count - 1), self.count)
