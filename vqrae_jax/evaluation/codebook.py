"""How well a codebook is used, from how often each code was chosen."""

import numpy as np
from jaxtyping import Float, Int


def health(counts: Int[np.ndarray, "*levels K"]) -> dict[str, float]:
    """Codebook health of one window.

    Returns:
      usage: fraction of codes chosen at least once, in [0, 1].
      perplexity: 2^entropy of the code distribution, in [1, K].
      entropy_bits: its entropy in bits, in [0, log2 K].
      dead: codes never chosen.
    Several levels (residual, product) are averaged, dead is their sum.
    """
    levels = np.asarray(counts, np.float64).reshape(-1, np.shape(counts)[-1])
    share = levels / np.maximum(levels.sum(1, keepdims=True), 1)
    entropy = _entropy_bits(share)
    return {
        "usage": float((levels > 0).mean()),
        "perplexity": float(np.exp2(entropy).mean()),
        "entropy_bits": float(entropy.mean()),
        "dead": float((levels == 0).sum()),
    }


def _entropy_bits(share: Float[np.ndarray, "levels K"]) -> Float[np.ndarray, " levels"]:
    return -np.sum(share * np.log2(np.where(share > 0, share, 1)), axis=1)
