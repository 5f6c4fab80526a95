"""A codebook that learns by gradient, from where the first batch puts it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vqrae_jax.quantizers.kmeans import First, Start, begin
from vqrae_jax.quantizers.nearest import Distance


class LearnedCodebook(nn.Module):
    """Codes are `first` + `offset`: codes made from latents (state), and what gradients add to them (parameters).

    Random codes lie where no latent is: a few of them win all latents, the others never learn. `params`: offset [K, C].
    `batch_stats`, unless start is "normal": first [K, C]; begun [], whether the first batch has made it.

    Attributes:
      num_embeddings, channels: K and C.
      start: as in `kmeans.begin`; "normal": random codes of about unit length, before training.
      distance: as in `nearest`.
    """

    num_embeddings: int
    channels: int
    start: Start
    distance: Distance

    def setup(self):
        shape, normal = (self.num_embeddings, self.channels), nn.initializers.normal(self.channels**-0.5)
        self.offset = self.param("offset", normal if self.start == "normal" else nn.initializers.zeros, shape)
        if self.start != "normal":
            self.first = self.variable("batch_stats", "first", lambda: normal(self.make_rng("params"), shape))
            self.begun = self.variable("batch_stats", "begun", lambda: jnp.zeros((), jnp.int32))

    def __call__(self) -> Float[Array, "K C"]:
        """The codes."""
        return self.offset if self.start == "normal" else self.offset + self.fixed()

    def fixed(self) -> Float[Array, "K C"] | float:
        """The part of the codes that gradients do not move."""
        return 0.0 if self.start == "normal" else jax.lax.stop_gradient(self.first.value)

    def initialize(self, first: First, count: Int[Array, ""]) -> None:
        """Makes the codes if these are the first latents of training, of which `count` count.

        Random draws come from the stream "codes".
        """
        if self.start == "normal" or self.is_initializing():
            return
        begins, unused = (self.begun.value == 0) & (count > 0), jnp.zeros(self.num_embeddings)
        self.first.value, _ = begin(
            begins, self.make_rng("codes"), first, self.first.value, unused, self.start, self.distance
        )
        self.begun.value = self.begun.value | begins
