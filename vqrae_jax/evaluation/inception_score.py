"""Inception score (Salimans et al. 2016, arXiv:1606.03498), from class scores that come in batches."""

import numpy as np
from jaxtyping import Float


class InceptionScore:
    """exp of the mean divergence of a picture's classes from those of its split; mean and deviation over splits.

    Pictures go to the splits in turn, so that an ordered dataset does not put classes apart.
    """

    def __init__(self, splits: int):
        self._splits, self.count = splits, 0
        self._counts = self._negentropy = np.zeros(splits)
        self._share = np.zeros((splits, 1))

    def add(self, logits: Float[np.ndarray, "n classes"]) -> None:
        """Takes in the scores of n pictures."""
        logits = np.asarray(logits, np.float64)
        logits = logits - logits.max(1, keepdims=True)
        log_share = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        share = np.exp(log_share)
        turn = (self.count + np.arange(len(logits))) % self._splits
        member = (np.arange(self._splits)[:, None] == turn).astype(np.float64)
        self.count += len(logits)
        self._counts = self._counts + member.sum(1)
        self._negentropy = self._negentropy + member @ (share * log_share).sum(1)
        self._share = self._share + member @ share

    def result(self) -> tuple[float, float]:
        """Mean and standard deviation over the splits; at least one picture per split."""
        marginal = self._share / self._counts[:, None]
        log_marginal = np.log(np.where(marginal > 0, marginal, 1))
        scores = np.exp(self._negentropy / self._counts - (marginal * log_marginal).sum(1))
        return float(scores.mean()), float(scores.std())
