"""Accuracy of a linear classifier on features: how much of an image's class they hold."""

import numpy as np
from jaxtyping import Float, Int

FIT_SHARE = 0.8  # share of the images that the classifier is fitted to; it predicts the others
PENALTIES = tuple(float(10**e) for e in np.arange(-6, 3.5, 0.5))  # relative to the mean variance of a feature


def linear_probe(features: Float[np.ndarray, "n C"], labels: Int[np.ndarray, " n"], seed: int = 0) -> dict[str, float]:
    """Fits a ridge classifier to a random share of the images and predicts the classes of the others.

    The penalty is the one with the least leave-one-out error on the fitted images, so nothing is tuned on the others.

    Returns:
      accuracy: on the images that were not fitted, in [0, 1].
      chance: the accuracy of always predicting the most frequent class of the fitted images.
    """
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
