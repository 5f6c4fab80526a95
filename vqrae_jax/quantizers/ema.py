"""The EMA vector quantizer: online k-means over latents (van den Oord et al. 2017, arXiv:1711.00937, appendix A.1)."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vqrae_jax.quantizers.base import Quantized, code_counts, straight_through, vq_loss
from vqrae_jax.quantizers.nearest import nearest


class EMAQuantizer(nn.Module):
    """Codes are running means of the latents assigned to them; nothing here is trained by gradient.

    State, in the mutable collection `batch_stats`, all float32:
      codebook [K, C]: the codes.
      counts [K]: running number of latents per code and step. Starts at one: from zero (the origin's start) the first
        update divides by almost nothing, throws the codes outwards and the codebook collapses.
      sums [K, C]: running sum of these latents; codebook = sums / smoothed counts.

    Statistics are taken over the whole batch, which under `jit` is the global one.

    Attributes:
      num_embeddings: codebook size K.
      commitment_cost: weight of the commitment loss.
      decay, epsilon: of the running means; epsilon is the pseudo-count of Laplace smoothing.
      start: "data" makes the first codes from random latents of the first training batch, "normal" from N(0, 1).
      revival_threshold: in training, a code whose count is below becomes a random latent of the batch; needs the rng
        stream "codes". 0 switches it off.
    """

    num_embeddings: int
    channels: int
    commitment_cost: float = 0.25
    decay: float = 0.99
    epsilon: float = 1e-5
    start: Literal["data", "normal"] = "data"
    revival_threshold: float = 0.0

    def setup(self):
        shape = (self.num_embeddings, self.channels)
        self.codebook = self.variable(
            "batch_stats", "codebook", lambda: jax.random.normal(self.make_rng("params"), shape)
        )
        self.counts = self.variable("batch_stats", "counts", jnp.ones, shape[:1])
        self.sums = self.variable("batch_stats", "sums", lambda: self.codebook.value)
        self.started = self.variable("batch_stats", "started", lambda: jnp.asarray(self.start == "normal"))

    def __call__(self, z: Float[Array, "*b C"], train: bool = False) -> Quantized:
        """Quantizes latents; train=True also updates the state, after it was used."""
        flat = z.reshape(-1, self.channels).astype(jnp.float32)
        update = train and not self.is_initializing()
        if update and self.start == "data":
            self._start(flat)
        indices = nearest(jax.lax.stop_gradient(flat), self.codebook.value)
        codes = self.codebook.value[indices]
        metrics = {"counts": code_counts(indices, self.num_embeddings)}
        if update:
            metrics |= self._update(jax.lax.stop_gradient(flat), indices, metrics["counts"])
        return Quantized(
            z=straight_through(flat, codes).reshape(z.shape),
            indices=indices.reshape(z.shape[:-1]),
            loss=vq_loss(flat, codes, self.commitment_cost),
            metrics=metrics,
        )

    def lookup(self, indices: Int[Array, "*b"]) -> Float[Array, "*b C"]:
        """The codes of `indices`."""
        return self.codebook.value[indices]

    def _start(self, flat: Float[Array, "N C"]) -> None:
        """The first batch makes the first codes; every later one leaves them alone."""
        codes = jax.lax.cond(
            self.started.value,
            lambda: self.codebook.value,
            lambda: jax.lax.stop_gradient(self._random_latents(flat)),
        )
        fresh = ~self.started.value
        self.codebook.value = codes
        self.sums.value = jnp.where(fresh, codes * self.counts.value[:, None], self.sums.value)
        self.started.value = jnp.ones_like(self.started.value)

    def _update(
        self, flat: Float[Array, "N C"], indices: Int[Array, " N"], counts: Int[Array, " K"]
    ) -> dict[str, Float[Array, ""]]:
        totals = jax.ops.segment_sum(flat, indices, self.num_embeddings)
        self.counts.value = self.decay * self.counts.value + (1 - self.decay) * counts
        self.sums.value = self.decay * self.sums.value + (1 - self.decay) * totals
        revived = jnp.zeros((), jnp.int32)
        if self.revival_threshold:
            revived = self._revive(flat)
        self.codebook.value = self.sums.value / self._smoothed_counts()[:, None]
        return {"revived": revived}

    def _revive(self, flat: Float[Array, "N C"]) -> Int[Array, ""]:
        """Codes that are hardly chosen move to latents of this batch, sums and counts together."""
        dead = self.counts.value < self.revival_threshold
        self.sums.value = jnp.where(dead[:, None], self._random_latents(flat), self.sums.value)
        self.counts.value = jnp.where(dead, 1.0, self.counts.value)
        return jnp.sum(dead, dtype=jnp.int32)

    def _random_latents(self, flat: Float[Array, "N C"]) -> Float[Array, "K C"]:
        """K rows of flat, without repetition where there are enough."""
        n = len(flat)
        order = jax.random.permutation(self.make_rng("codes"), n)
        return flat[order[jnp.arange(self.num_embeddings) % n]]

    def _smoothed_counts(self) -> Float[Array, " K"]:
        """Laplace smoothing: no count is zero, and the total stays what it was."""
        total = jnp.sum(self.counts.value)
        return (self.counts.value + self.epsilon) / (total + self.num_embeddings * self.epsilon) * total
