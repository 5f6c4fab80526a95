"""How much of an image's class a linear map reads from its features: ridge regression on a split, in closed form."""

import numpy as np
from jaxtyping import Float, Int

FIT_SHARE = 0.8  # of the images; the others are predicted
PENALTIES = tuple(float(10**e) for e in np.arange(-6, 3.5, 0.5))  # relative to the mean variance of a feature


def linear_probe(features: Float[np.ndarray, "n C"], labels: Int[np.ndarray, " n"], seed: int = 0) -> dict[str, float]:
    """Fits one-hot labels on a random share of the images and predicts the classes of the others.

    The penalty is the one of least generalized cross-validation error on the fitted images (Golub et al. 1979,
    doi:10.1080/00401706.1979.10489751), so nothing is tuned on the others.

    Returns:
      accuracy: of the images not fitted, in [0, 1].
      chance: the accuracy of always saying the class most frequent among the fitted.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    fit, test = np.split(order, [round(FIT_SHARE * len(order))])
    classes, target = np.unique(labels[fit], return_inverse=True)
    x = np.asarray(features[fit], np.float64)
    mean, shares = x.mean(0), np.bincount(target) / len(fit)
    x = x - mean
    # Sums over the images of each class stand for the product with the one-hot matrix, which is never built.
    totals = np.zeros((len(classes), x.shape[1]))
    np.add.at(totals, target, x)
    variances, axes = np.linalg.eigh(x.T @ x / len(fit))
    variances = np.maximum(variances, 0)
    projected = axes.T @ totals.T / len(fit)  # [C, classes]
    penalty = min(
        (p * max(variances.mean(), 1e-30) for p in PENALTIES),
        key=lambda p: _generalized_error(p, variances, projected, 1 - (shares**2).sum(), len(fit)),
    )
    weights = axes @ (projected / (variances + penalty)[:, None])
    scores = (np.asarray(features[test], np.float64) - mean) @ weights + shares
    return {
        "accuracy": float((classes[scores.argmax(1)] == labels[test]).mean()),
        "chance": float((classes[shares.argmax()] == labels[test]).mean()),
    }


def _generalized_error(
    penalty: float, variances: Float[np.ndarray, " C"], projected: Float[np.ndarray, "C classes"], spread: float, n: int
) -> float:
    """Residual of the fit over the squared share of its free dimensions; `spread` is the variance of the labels."""
    shrunk = variances / (variances + penalty)
    explained = (2 - shrunk) * (projected**2).sum(1) / (variances + penalty)
    return (spread - explained.sum()) / max(1 - (1 + shrunk.sum()) / n, 1e-6) ** 2
