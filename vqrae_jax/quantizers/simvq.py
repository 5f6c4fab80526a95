"""SimVQ: a frozen codebook seen through one learned linear map (Zhu et al. 2024, arXiv:2411.02038)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vqrae_jax.quantizers.base import Quantized, Quantizer, flatten, health, vq_loss
from vqrae_jax.quantizers.entropy import diversity
from vqrae_jax.quantizers.estimators import ESTIMATORS, Estimator
from vqrae_jax.quantizers.kmeans import First, Start, begin
from vqrae_jax.quantizers.nearest import Distance, nearest, unit
from vqrae_jax.quantizers.regularizers import orthogonality


class SimVQ(Quantizer):
    """Codes are W e + b of fixed e: one gradient moves all of them, so none is left behind.

    In the paper e is random. Frozen features have a large mean, and in many channels random directions are all far from
    them: two of 2,048 such codes then take every latent, and the loss pulls all latents to these two. So here e comes
    from the first training batch, and W and the input's projection start as the identity.

    `params`: codebook_projection (W, b) and, with input_projection, input_projection. `batch_stats`: codebook [K, C],
    the fixed vectors e; begun [], whether the first batch has made them.

    Attributes:
      num_embeddings, channels: K and C.
      commitment_cost: weight of the commitment loss (of the codebook loss if `legacy`).
      start: as in `kmeans.begin`; "normal": the paper's random e and projections, before training.
      distance: "cosine": latents and codes are brought to unit length, and what is quantized is the direction.
      input_projection: latents pass a learned linear map first. Nothing undoes it: the decoder reads projected latents.
        The commitment loss can then shrink to nothing by moving all latents together: of frozen features half as many
        codes stayed in use with it.
      legacy: the weight is on the codebook's term instead of the commitment's, as in the VQGAN release and the origin.
      estimator: the gradient through the choice.
      orthogonality_cost: weight of `regularizers.orthogonality` of the codes.
      diversity_cost, temperature: weight of `entropy.diversity` of the soft codes, and its temperature.
    """

    num_embeddings: int
    channels: int
    commitment_cost: float = 0.25
    start: Start = "kmeans"
    distance: Distance = "cosine"
    input_projection: bool = False
    legacy: bool = True
    estimator: Estimator = "straight_through"
    orthogonality_cost: float = 0.0
    diversity_cost: float = 0.0
    temperature: float = 1.0

    def setup(self):
        shape, scale = (self.num_embeddings, self.channels), self.channels**-0.5
        self.codebook = self.variable(
            "batch_stats", "codebook", lambda: scale * jax.random.normal(self.make_rng("params"), shape)
        )
        self.begun = self.variable("batch_stats", "begun", lambda: jnp.asarray(int(self.start == "normal"), jnp.int32))
        initial = nn.initializers.lecun_normal() if self.start == "normal" else _identity
        dense = {"precision": jax.lax.Precision.HIGHEST, "kernel_init": initial}
        self.codebook_projection = nn.Dense(self.channels, **dense, name="codebook_projection")
        if self.input_projection:
            self.projection = nn.Dense(self.channels, **dense, name="input_projection")

    def __call__(self, z: Float[Array, "*b C"], train: bool = False) -> Quantized:
        """Quantizes latents; with train=True the first of them make the codes."""
        flat, finite = flatten(z, self.channels)
        flat = self.projection(flat) if self.input_projection else flat
        flat = unit(flat) if self.distance == "cosine" else flat
        if train:
            fixed = jax.lax.stop_gradient(flat)
            self.initialize(lambda: (fixed, finite), jnp.sum(finite))
        codebook = self.embeddings()
        indices = nearest(flat, codebook, self.distance)
        codes = codebook[indices]
        ends = (codes, flat) if self.legacy else (flat, codes)
        loss = vq_loss(*ends, finite, self.commitment_cost)
        if self.orthogonality_cost:
            loss += self.orthogonality_cost * orthogonality(codebook)
        if self.diversity_cost:
            loss += self.diversity_cost * diversity(flat, codebook, finite, self.temperature)
        return Quantized(
            z=ESTIMATORS[self.estimator](flat, codes, finite).reshape(z.shape),
            indices=indices.reshape(z.shape[:-1]),
            loss=loss,
            metrics=health(flat, codes, indices, self.num_embeddings, finite),
        )

    def initialize(self, first: First, count: Int[Array, ""]) -> None:
        """Makes the fixed vectors if these are the first latents of training, of which `count` count.

        The input's projection is taken for the identity, which it still is.
        """
        if self.start == "normal" or self.is_initializing():
            return
        begins, unused = (self.begun.value == 0) & (count > 0), jnp.zeros(self.num_embeddings)
        self.codebook.value, _ = begin(
            begins, self.make_rng("codes"), first, self.codebook.value, unused, self.start, self.distance
        )
        self.begun.value = self.begun.value | begins

    def lookup(self, indices: Int[Array, "*b"]) -> Float[Array, "*b C"]:
        """The codes of `indices`."""
        return self.embeddings()[indices]

    def embeddings(self) -> Float[Array, "K C"]:
        """The projected codes."""
        # The whole codebook, also for a few indices: another matmul shape could round differently.
        codes = self.codebook_projection(self.codebook.value)
        return unit(codes) if self.distance == "cosine" else codes


def _identity(key: PRNGKeyArray, shape: tuple[int, int], dtype: jnp.dtype = jnp.float32) -> Float[Array, "C C"]:
    return jnp.eye(*shape, dtype=dtype)
