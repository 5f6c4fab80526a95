"""Index backpropagation quantization (Shi et al. 2024, arXiv:2412.02692): every embedding learns from every latent."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vqrae_jax.quantizers import registry
from vqrae_jax.quantizers.arrays import AnyArray, Codebook
from vqrae_jax.quantizers.base import Quantized, Quantizer, Sample, batch_metrics, flatten, masked_mean, vq_loss
from vqrae_jax.quantizers.codebook_losses import entropies, orthogonality
from vqrae_jax.quantizers.estimators import value_of
from vqrae_jax.quantizers.kmeans import LearnedCodebook
from vqrae_jax.quantizers.nearest import nearest, unit


class IBQ(Quantizer):
    """The nearest embedding, with a one-hot index that is straight-through for the softmax over all embeddings.

    The codebook is a `LearnedCodebook`. Latents and codebook both receive the decoder's gradient through the softmax,
    and the codebook also as the chosen embedding. Training holds N x K probabilities, which the method needs;
    evaluation does not.

    Logits are z . e - |e|^2 / 2 for the distance "l2", cosines for "angle", and z . e otherwise: "dot" is the paper's,
    and cosines, also of "cosine" (unit length), need a small temperature.
    """

    num_embeddings: registry.NumEmbeddings
    channels: registry.Channels
    commitment_cost: registry.CommitmentCost = 0.25
    entropy_cost: registry.EntropyCost = 0.1
    temperature: registry.Temperature = 1.0
    orthogonality_cost: registry.OrthogonalityCost = 0.0
    codebook_init: registry.InitSetting = "kmeans"
    distance: registry.DistanceSetting = "l2"

    def setup(self):
        # The nearest mean need not have the largest product, so the codebook starts as means by distance.
        distance = "l2" if self.distance == "dot" else self.distance
        self.codebook = LearnedCodebook(self.num_embeddings, self.channels, self.codebook_init, distance)

    def __call__(self, z: Float[AnyArray, "*b C"], train: bool = False) -> Quantized:
        flat, finite = flatten(z, self.channels)
        flat = unit(flat) if self.distance == "cosine" else flat
        if train:
            latents = jax.lax.stop_gradient(flat)
            self.initialize(lambda: (latents, finite), jnp.sum(finite))
        codebook = self.embeddings()
        indices = nearest(flat, codebook, self.distance)
        quantized = codebook[indices]
        fixed = jax.lax.stop_gradient
        # The double quantization loss of the paper: on the chosen embedding, and (below) on the embedding as its index
        # passes gradients.
        loss = vq_loss(flat, quantized, finite, self.commitment_cost, distance=self.distance)
        if self.orthogonality_cost:
            loss += self.orthogonality_cost * orthogonality(codebook)
        metrics = batch_metrics(flat, quantized, indices, self.num_embeddings, finite)
        out = quantized
        if train:
            pair = (unit(flat), unit(codebook)) if self.distance == "angle" else (flat, codebook)
            logits = jnp.dot(pair[0], pair[1].T, precision=jax.lax.Precision.HIGHEST)
            logits -= 0.5 * jnp.sum(codebook**2, axis=1) if self.distance == "l2" else 0.0
            soft = jax.nn.softmax(logits / self.temperature, axis=-1)
            # one_hot + soft - stop_gradient(soft), times the codebook, without a second N x K matrix.
            through = jnp.dot(soft, fixed(codebook), precision=jax.lax.Precision.HIGHEST)
            out = value_of(quantized, quantized + through)
            certainty, spread = entropies(soft, finite)
            loss += masked_mean((out - flat) ** 2, finite) + self.entropy_cost * (certainty - spread)
            metrics |= {"entropy": fixed(certainty), "batch_entropy": fixed(spread)}
        return Quantized(out.reshape(z.shape), indices.reshape(z.shape[:-1]), loss, metrics)

    def initialize(self, sample: Sample, count: Int[Array, ""]) -> None:
        self.codebook.initialize(sample, count)

    def embeddings(self) -> Codebook:
        return unit(self.codebook()) if self.distance == "cosine" else self.codebook()


registry.register(
    "ibq", IBQ, "Shi et al. 2024, arXiv:2412.02692",
    "all embeddings learn from all latents; N x K probabilities in training",
    codebook={"first": "K C", "offset": "K C"}, inner=True,
)  # fmt: skip
