"""Index backpropagation quantization (Shi et al. 2024, arXiv:2412.02692): every code learns from every latent."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vqrae_jax.quantizers.base import Quantized, Quantizer, flatten, health, kept_mean
from vqrae_jax.quantizers.entropy import entropies
from vqrae_jax.quantizers.estimators import value_of
from vqrae_jax.quantizers.kmeans import First, Start
from vqrae_jax.quantizers.learned import LearnedCodebook
from vqrae_jax.quantizers.nearest import Distance, nearest, unit
from vqrae_jax.quantizers.regularizers import orthogonality


class IBQ(Quantizer):
    """The nearest code; its one-hot index is straight-through for the softmax over all codes.

    The codebook is a `LearnedCodebook`. Latents and codebook both receive the decoder's gradient, through the softmax,
    and the codebook also as the chosen code. Training holds N x K probabilities, as the method must; evaluation does
    not.

    Attributes:
      num_embeddings, channels: K and C.
      commitment_cost: weight of the pull of latents to codes.
      entropy_cost: weight of (mean entropy of a latent's softmax) - (entropy of the mean softmax).
      temperature: of the softmax.
      start: see `LearnedCodebook`.
      distance: "dot": the code with the largest product, as in the paper, logits z . c. "l2": the nearest code, logits
        z . c - |c|^2 / 2. "cosine": latents and codes of unit length, logits z . c; the temperature should be small.
      orthogonality_cost: weight of `regularizers.orthogonality` of the codes.
    """

    num_embeddings: int
    channels: int
    commitment_cost: float = 0.25
    entropy_cost: float = 0.05
    temperature: float = 1.0
    orthogonality_cost: float = 0.0
    start: Start = "kmeans"
    distance: Distance = "l2"

    def setup(self):
        # The nearest mean has not the largest product: codes start as means by distance.
        distance = "l2" if self.distance == "dot" else self.distance
        self.codebook = LearnedCodebook(self.num_embeddings, self.channels, self.start, distance)

    def __call__(self, z: Float[Array, "*b C"], train: bool = False) -> Quantized:
        """Quantizes latents; train=True also computes the softmax over all codes, and the first latents make these."""
        flat, finite = flatten(z, self.channels)
        flat = unit(flat) if self.distance == "cosine" else flat
        if train:
            latents = jax.lax.stop_gradient(flat)
            self.initialize(lambda: (latents, finite), jnp.sum(finite))
        codebook = self.embeddings()
        indices = nearest(flat, codebook, self.distance)
        codes = codebook[indices]
        fixed = jax.lax.stop_gradient
        # The paper's double quantization loss: on the chosen code, and on the code as its index lets gradients through.
        loss = kept_mean((codes - fixed(flat)) ** 2, finite)
        loss += self.commitment_cost * kept_mean((fixed(codes) - flat) ** 2, finite)
        if self.orthogonality_cost:
            loss += self.orthogonality_cost * orthogonality(codebook)
        metrics = health(flat, codes, indices, self.num_embeddings, finite)
        out = codes
        if train:
            logits = jnp.dot(flat, codebook.T, precision=jax.lax.Precision.HIGHEST)
            logits -= 0.5 * jnp.sum(codebook**2, axis=1) if self.distance == "l2" else 0.0
            soft = jax.nn.softmax(logits / self.temperature, axis=-1)
            # one_hot + soft - stop_gradient(soft), times the codebook, without a second N x K matrix.
            through = jnp.dot(soft, fixed(codebook), precision=jax.lax.Precision.HIGHEST)
            out = value_of(codes, codes + through)
            certainty, spread = entropies(soft, finite)
            loss += kept_mean((out - flat) ** 2, finite) + self.entropy_cost * (certainty - spread)
            metrics |= {"entropy": fixed(certainty), "batch_entropy": fixed(spread)}
        return Quantized(
            z=out.reshape(z.shape),
            indices=indices.reshape(z.shape[:-1]),
            loss=loss,
            metrics=metrics,
        )

    def initialize(self, first: First, count: Int[Array, ""]) -> None:
        """As `LearnedCodebook.initialize`."""
        self.codebook.initialize(first, count)

    def lookup(self, indices: Int[Array, "*b"]) -> Float[Array, "*b C"]:
        """The codes of `indices`."""
        return self.embeddings()[indices]

    def embeddings(self) -> Float[Array, "K C"]:
        """The codes, of unit length for "cosine"."""
        return unit(self.codebook()) if self.distance == "cosine" else self.codebook()
