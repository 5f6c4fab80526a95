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


def alarm(counts: Int[np.ndarray, "*levels K"], share: float) -> str | None:
    """A sentence where fewer than `share` of the codes are in use that could be (with fewer latents than codes, not
    all can); None otherwise."""
    levels = np.reshape(counts, (-1, np.shape(counts)[-1]))
    used = (levels > 0).sum(1)
    possible = np.minimum(levels.shape[1], levels.sum(1))
    worst = int(np.argmin(used / np.maximum(possible, 1)))
    if used[worst] >= share * possible[worst]:
        return None
    which = f" of level {worst}" if len(levels) > 1 else ""
    return (
        f"ALARM: {used[worst]} of {levels.shape[1]} codes{which} are in use, fewer than {share:.1%} of those that "
        f"{levels[worst].sum()} latents could use"
    )


def _entropy_bits(share: Float[np.ndarray, "levels K"]) -> Float[np.ndarray, " levels"]:
    return -np.sum(share * np.log2(np.where(share > 0, share, 1)), axis=1)
