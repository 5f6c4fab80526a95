"""Mean and covariance of rows that come in batches, in any order and any parts."""

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Gaussian(NamedTuple):
    """What of a set of features a Frechet distance looks at."""

    mean: Float[np.ndarray, " D"]
    covariance: Float[np.ndarray, "D D"]
    count: int | None = None  # features it was estimated from, where that is known

    def digest(self) -> str:
        """SHA-256 of mean and covariance."""
        return hashlib.sha256(np.float64(self.mean).tobytes() + np.float64(self.covariance).tobytes()).hexdigest()


class Moments:
    """Count, mean and sum of products of deviations, in float64.

    A batch is centred on its own mean before anything is multiplied, and merged by the difference of the means (Chan et
    al. 1983, doi:10.1080/00031305.1983.10483115): no cancellation, however far the mean is from zero.
    """

    def __init__(self):
        self.count = 0
        self.mean = self.products = np.zeros(())  # [D] and [D, D] once there are rows

    def add(self, rows: Float[np.ndarray, "n D"]) -> None:
        """Takes in rows; none is fine."""
        if not len(rows):
            return
        rows, batch = np.asarray(rows, np.float64), Moments()
        batch.count, batch.mean = len(rows), rows.mean(0)
        rows = rows - batch.mean
        batch.products = rows.T @ rows
        self.merge(batch)

    def merge(self, other: "Moments") -> None:
        """Takes in what another has seen."""
        if not other.count:
            return
        total = self.count + other.count
        delta = other.mean - self.mean
        self.products = (
            self.products + other.products + self.count * other.count / total * np.multiply.outer(delta, delta)
        )
        self.mean = self.mean + delta * (other.count / total)
        self.count = total

    def arrays(self) -> dict[str, np.ndarray]:
        """All that was seen, for `of` in another process."""
        return {"count": np.asarray(self.count), "mean": self.mean, "products": self.products}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> "Moments":
        """The inverse of `arrays`."""
        moments = cls()
        moments.count, moments.mean, moments.products = int(arrays["count"]), arrays["mean"], arrays["products"]
        return moments

    def gaussian(self) -> Gaussian:
        """Mean and covariance, the latter from count - 1 degrees of freedom as `numpy.cov`; needs two rows."""
        return Gaussian(self.mean, self.products / (self.count - 1), self.count)
