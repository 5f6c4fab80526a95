"""Mean and covariance of rows that come in batches, in any order and any parts."""

import numpy as np
from jaxtyping import Float


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
        self.products = self.products + other.products + self.count * other.count / total * np.multiply.outer(
            delta, delta
        )
        self.mean = self.mean + delta * (other.count / total)
        self.count = total

    @property
    def covariance(self) -> Float[np.ndarray, "D D"]:
        """Of the population, from count - 1 degrees of freedom, as `numpy.cov`; needs two rows."""
        return self.products / (self.count - 1)
