"""Distances between sets of features, the Inception score of class scores, and a linear classifier on features."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

from vqrae_jax.errors import import_extra
from vqrae_jax.evaluation.moments import Gaussian

BLOCK = 1024  # rows of a matrix of pairs that exist at once
NEIGHBORS = 3  # k: a row covers the ball as far as its k-th nearest other row, for precision and recall
FIT_SHARE = 0.8  # share of the images that the linear classifier is fitted to; it predicts the others
PENALTIES = tuple(float(10**e) for e in np.arange(-6, 3.5, 0.5))  # relative to the mean variance of a feature


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Returns the Frechet distance of two Gaussians, at least 0 (Heusel et al. 2017, arXiv:1706.08500, equation 6).

    It is |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2). With S_a = F F^T and S_b = G G^T the trace of the root is the
    sum of the singular values of F^T G, so only symmetric matrices are decomposed. The result is real, and exact for
    covariances without full rank.
    """
    cross = np.linalg.svd(_factor(a.covariance).T @ _factor(b.covariance), compute_uv=False).sum()
    difference = np.asarray(a.mean, np.float64) - b.mean
    return max(float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross), 0.0)


def _factor(covariance: Float[np.ndarray, "D D"]) -> Float[np.ndarray, "D rank"]:
    """Returns F with F F^T = covariance; its columns are the principal axes of positive variance."""
    values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))
    positive = values > len(values) * np.finfo(np.float64).eps * values[-1]
    return vectors[:, positive] * np.sqrt(values[positive])


def kernel_distance(x: Float[np.ndarray, "n D"], y: Float[np.ndarray, "m D"]) -> float:
    """Returns the squared maximum mean discrepancy with the kernel (x . y / D + 1)^3: KID (arXiv:1801.01401).

    This is the unbiased estimate over all pairs: about 0, possibly below, for two sets of one distribution, whatever
    their sizes. Both sets need at least two rows. KID is often reported times 1,000.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    diagonals = [(((z * z).sum(1) / z.shape[1] + 1) ** 3).sum() for z in (x, y)]
    within = sum((_kernel_sum(z, z) - d) / (len(z) * (len(z) - 1)) for z, d in zip((x, y), diagonals, strict=True))
    return float(within - 2 * _kernel_sum(x, y) / (len(x) * len(y)))


def _kernel_sum(x: Float[np.ndarray, "n D"], y: Float[np.ndarray, "m D"]) -> float:
    return sum(((x[i : i + BLOCK] @ y.T / x.shape[1] + 1) ** 3).sum() for i in range(0, len(x), BLOCK))


def precision_recall(images: Float[np.ndarray, "n D"], samples: Float[np.ndarray, "m D"]) -> tuple[float, float]:
    """Returns precision and recall of the features of samples (Kynkaanniemi et al. 2019, arXiv:1904.06991).

    A set covers the balls around its rows whose radii are the distances to the 3rd nearest other row of the set.
    Precision is the share of the samples that the images cover, recall the share of the images that the samples cover;
    both sets need at least four rows. Distances are computed in float64, BLOCK rows at a time, which changes no value.
    """
    x, y = (np.asarray(z, np.float64) - np.mean(images, 0, np.float64) for z in (images, samples))
    x_radii, y_radii = _neighbor_distances(x), _neighbor_distances(y)
    precise, recalled = np.zeros(len(y), bool), 0
    for i in range(0, len(x), BLOCK):
        distances = _squared_distances(x[i : i + BLOCK], y)
        precise |= (distances <= x_radii[i : i + BLOCK, None]).any(0)
        recalled += int((distances <= y_radii).any(1).sum())
    return float(precise.mean()), recalled / len(x)


def _neighbor_distances(x: Float[np.ndarray, "n D"]) -> Float[np.ndarray, " n"]:
    blocks = (_squared_distances(x[i : i + BLOCK], x) for i in range(0, len(x), BLOCK))
    return np.concatenate([np.partition(block, NEIGHBORS)[:, NEIGHBORS].copy() for block in blocks])


def _squared_distances(x: Float[np.ndarray, "n D"], y: Float[np.ndarray, "m D"]) -> Float[np.ndarray, "n m"]:
    squares = [(z * z).sum(1) for z in (x, y)]
    distances = (-2 * x) @ y.T
    distances += squares[0][:, None]
    distances += squares[1]
    distances[distances < 1e-12 * sum(square.max() for square in squares)] = 0  # equal rows, in spite of rounding
    return distances


class InceptionScore:
    """The Inception score (Salimans et al. 2016, arXiv:1606.03498) from class scores that arrive in batches.

    The score of a split is exp of the mean divergence of an image's classes from those of all its images. Images are
    dealt out to the splits in turn, so that the classes of an ordered dataset are in all of them. With `block`, split i
    has the images of index [i * block, (i + 1) * block), as in the evaluator of ADM.
    """

    def __init__(self, splits: int, block: int | None = None):
        self._splits, self._block = splits, block
        self._sums = {"counts": np.zeros(splits), "negentropy": np.zeros(splits), "share": np.zeros((splits, 1))}

    @property
    def count(self) -> int:
        return int(self._sums["counts"].sum())

    def add(self, logits: Float[np.ndarray, "n classes"], index: Int[np.ndarray, " n"]) -> None:
        """Adds the class scores of n images and their indices in the dataset."""
        logits = np.asarray(logits, np.float64)
        logits = logits - logits.max(1, keepdims=True)
        log_share = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        share = np.exp(log_share)
        split = index // self._block if self._block else index % self._splits
        member = (np.arange(self._splits)[:, None] == split).astype(np.float64)
        negentropy = member @ (share * log_share).sum(1)
        self.merge_arrays({"counts": member.sum(1), "negentropy": negentropy, "share": member @ share})

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the state as arrays, for `merge_arrays` in another process."""
        return self._sums

    def merge_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Adds the images of another InceptionScore with the same number of splits."""
        self._sums = {name: total + arrays[name] for name, total in self._sums.items()}

    def result(self) -> tuple[float, float]:
        """Returns mean and standard deviation over the splits; each needs at least one image."""
        counts, negentropy, share = self._sums.values()
        marginal = share / counts[:, None]
        log_marginal = np.log(np.where(marginal > 0, marginal, 1))
        scores = np.exp(negentropy / counts - (marginal * log_marginal).sum(1))
        return float(scores.mean()), float(scores.std())


def linear_probe(
    features: Float[np.ndarray, "n C"], labels: Int[np.ndarray, " n"], seed: int = 0
) -> dict[str, int | float]:
    """Fits a ridge classifier to a random share of the images and returns its accuracy on the others.

    The penalty is the one with the least leave-one-out error on the fitted images, so nothing is tuned on the others.
    `chance` is the accuracy of always predicting the most frequent class.
    """
    with import_extra("train", "the linear probe"):
        from sklearn.linear_model import RidgeClassifierCV

    order = np.random.default_rng(seed).permutation(len(labels))
    fit, test = np.split(order, [round(FIT_SHARE * len(order))])
    x = np.asarray(features, np.float64)
    x = x - x[fit].mean(0)
    scale = max(x[fit].var(0).mean(), 1e-30) * len(fit)
    classifier = RidgeClassifierCV([penalty * scale for penalty in PENALTIES]).fit(x[fit], labels[fit])
    classes, counts = np.unique(labels[fit], return_counts=True)
    return {
        "accuracy": float((classifier.predict(x[test]) == labels[test]).mean()),
        "chance": float((classes[counts.argmax()] == labels[test]).mean()),
    }
