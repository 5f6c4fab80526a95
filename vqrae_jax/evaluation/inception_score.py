"""Inception score (Salimans et al. 2016, arXiv:1606.03498), from class scores that come in batches."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int


class InceptionScore:
    """exp of the mean divergence of a picture's classes from those of its split; mean and deviation over splits.

    Pictures go to the splits in turn, so that an ordered dataset does not put classes apart.
    """

    def __init__(self, splits: int):
        self._splits = splits
        self._counts = self._negentropy = np.zeros(splits)
        self._share = np.zeros((splits, 1))

    @property
    def count(self) -> int:
        """Pictures seen."""
        return int(self._counts.sum())

    def add(self, logits: Float[np.ndarray, "n classes"], index: Int[np.ndarray, " n"]) -> None:
        """Takes in the scores of n pictures, and their numbers in the dataset."""
        logits = np.asarray(logits, np.float64)
        logits = logits - logits.max(1, keepdims=True)
        log_share = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        share = np.exp(log_share)
        member = (np.arange(self._splits)[:, None] == index % self._splits).astype(np.float64)
        self._counts = self._counts + member.sum(1)
        self._negentropy = self._negentropy + member @ (share * log_share).sum(1)
        self._share = self._share + member @ share

    def arrays(self) -> dict[str, np.ndarray]:
        """All that was seen, for `merge` in another process."""
        return {"counts": self._counts, "negentropy": self._negentropy, "share": self._share}

    def merge(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes in what another with as many splits has seen."""
        self._counts = self._counts + arrays["counts"]
        self._negentropy = self._negentropy + arrays["negentropy"]
        self._share = self._share + arrays["share"]

    def result(self) -> tuple[float, float]:
        """Mean and standard deviation over the splits; at least one picture per split."""
        marginal = self._share / self._counts[:, None]
        log_marginal = np.log(np.where(marginal > 0, marginal, 1))
        scores = np.exp(self._negentropy / self._counts - (marginal * log_marginal).sum(1))
        return float(scores.mean()), float(scores.std())
