"""Lloyd's k-means on all latents at once: the reference for codebooks that learn online."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vqrae_jax.quantizers.nearest import nearest
from vqrae_jax.quantizers.statistics import code_counts, code_totals


def lloyd(latents: Float[np.ndarray, "N C"], size: int, iterations: int) -> Float[Array, "K C"]:
    """Returns `size` embeddings, started from random latents; one without latents stays where it is."""
    start = np.random.default_rng(0).permutation(len(latents))[np.arange(size) % len(latents)]

    @jax.jit
    def iterate(codebook: Float[Array, "K C"], latents: Float[Array, "N C"]) -> Float[Array, "K C"]:
        indices = nearest(latents, codebook)
        counts = code_counts(indices, size)[:, None]
        return jnp.where(counts > 0, code_totals(latents, indices, size) / jnp.maximum(counts, 1), codebook)

    latents = jnp.asarray(latents)
    codebook = latents[start]
    for _ in range(iterations):
        codebook = iterate(codebook, latents)
    return codebook
