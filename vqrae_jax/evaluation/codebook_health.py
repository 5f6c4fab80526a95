"""Codebook statistics from the number of times that each index was chosen."""

import numpy as np
from jaxtyping import Int


def health(counts: Int[np.ndarray, "*levels K"]) -> dict[str, int | float]:
    """Returns how well one or several codebooks are used.

    Returns:
      usage: fraction of indices chosen at least once, in [0, 1].
      perplexity: 2^entropy of the distribution of indices, in [1, K].
      entropy_bits: its entropy in bits, in [0, log2 K].
      dead: number of indices never chosen; the sum over levels, while the others are means over levels.
    """
    levels = np.asarray(counts, np.float64).reshape(-1, np.shape(counts)[-1])
    share = levels / np.maximum(levels.sum(1, keepdims=True), 1)
    entropy = -np.sum(share * np.log2(np.where(share > 0, share, 1)), axis=1)
    return {
        "usage": float((levels > 0).mean()),
        "perplexity": float(np.exp2(entropy).mean()),
        "entropy_bits": float(entropy.mean()),
        "dead": float((levels == 0).sum()),
    }


def alarm(counts: Int[np.ndarray, "*levels K"], share: float) -> str | None:
    """Returns a warning if fewer than `share` of the indices are in use, None otherwise.

    With fewer latents than indices not all indices can be in use; `share` is of those that can.
    """
    levels = np.reshape(counts, (-1, np.shape(counts)[-1]))
    used = (levels > 0).sum(1)
    possible = np.minimum(levels.shape[1], levels.sum(1))
    worst = int(np.argmin(used / np.maximum(possible, 1)))
    if used[worst] >= share * possible[worst]:
        return None
    level = f" of level {worst}" if len(levels) > 1 else ""
    return (
        f"ALARM: only {used[worst]} of {levels.shape[1]} codes{level} are in use, below {share:.1%} of the "
        f"{possible[worst]} that {levels[worst].sum()} latents can use"
    )
