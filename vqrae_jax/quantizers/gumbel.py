"""Gumbel-softmax quantization (Jang et al. 2016, arXiv:1611.01144; DALL-E: Ramesh et al. 2021, arXiv:2102.12092)."""

from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vqrae_jax.quantizers import registry
from vqrae_jax.quantizers.arrays import AnyArray, Codebook, Rows, Scalar
from vqrae_jax.quantizers.base import Quantized, Quantizer, Sample, batch_metrics, flatten, masked_mean
from vqrae_jax.quantizers.codebook_losses import orthogonality
from vqrae_jax.quantizers.estimators import value_of
from vqrae_jax.quantizers.kmeans import LearnedCodebook


class GumbelQuantizer(Quantizer):
    """A classifier chooses the index; training samples it, and gradients pass through the softmax of the noisy logits.

    The logits are linear in the latent, C -> K (`params`: logits), and the codebook is a `LearnedCodebook`; both learn
    from the decoder's gradient. If the embeddings e start from data, z . e - |e|^2 / 2 is added to the logits, so that
    the nearest embedding is the likeliest at first. Training holds N x K probabilities, which the method needs, and
    draws from the rng stream "codes"; evaluation takes the likeliest index.
    """

    num_embeddings: registry.NumEmbeddings
    channels: registry.Channels
    temperature: registry.Temperature = 1.0
    final_temperature: Annotated[
        float, registry.Setting("temperature after anneal_steps, usually 0.1 to 0.5", gt=0)
    ] = 0.1
    # In calls with train=True, of which a step has several if levels or scales share this quantizer.
    anneal_steps: Annotated[
        int,
        registry.Setting(
            "training steps from the first to the last temperature, usually the first fifth of a run", ge=1, le=10**9
        ),
    ] = 10_000
    kl_cost: Annotated[
        float, registry.Setting("weight of the divergence of the logits from uniform ones, usually 5e-4", "")
    ] = 5e-4
    orthogonality_cost: registry.OrthogonalityCost = 0.0
    codebook_init: registry.InitSetting = "kmeans"  # the papers use "normal"

    def setup(self):
        self.codebook = LearnedCodebook(self.num_embeddings, self.channels, self.codebook_init, "l2")
        initial = nn.initializers.lecun_normal() if self.codebook_init == "normal" else nn.initializers.zeros
        self.classifier = nn.Dense(
            self.num_embeddings, precision=jax.lax.Precision.HIGHEST, kernel_init=initial, name="logits"
        )
        self.step = self.variable("batch_stats", "step", lambda: jnp.zeros((), jnp.int32))

    def __call__(self, z: Float[AnyArray, "*b C"], train: bool = False) -> Quantized:
        flat, finite = flatten(z, self.channels)
        if train:
            fixed = jax.lax.stop_gradient(flat)
            self.initialize(lambda: (fixed, finite), jnp.sum(finite))
        codebook, logits = self.codebook(), self._logits(flat)
        samples = train and not self.is_initializing()
        noise = jax.random.gumbel(self.make_rng("codes"), logits.shape) if samples else 0.0
        indices = jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)
        quantized = codebook[indices]
        soft = jax.nn.softmax((logits + noise) / self._temperature(), axis=-1)
        carrier = jnp.dot(soft, codebook, precision=jax.lax.Precision.HIGHEST)
        log_p = jax.nn.log_softmax(logits, axis=-1)
        kl = jnp.sum(jnp.exp(log_p) * log_p, axis=-1, keepdims=True) + np.log(self.num_embeddings)
        loss = self.kl_cost * masked_mean(kl, finite)
        if self.orthogonality_cost:
            loss += self.orthogonality_cost * orthogonality(codebook)
        if samples:
            self.step.value = self.step.value + 1
        out = value_of(quantized, carrier).reshape(z.shape)
        metrics = batch_metrics(flat, quantized, indices, self.num_embeddings, finite)
        return Quantized(out, indices.reshape(z.shape[:-1]), loss, metrics)

    def initialize(self, sample: Sample, count: Int[Array, ""]) -> None:
        self.codebook.initialize(sample, count)

    def embeddings(self) -> Codebook:
        return self.codebook()

    def _logits(self, flat: Rows) -> Float[Array, "N K"]:
        logits, first = self.classifier(flat), self.codebook.fixed()
        if self.codebook_init == "normal":
            return logits
        return logits + jnp.dot(flat, first.T, precision=jax.lax.Precision.HIGHEST) - 0.5 * jnp.sum(first**2, axis=1)

    def _temperature(self) -> Scalar:
        progress = jnp.minimum(self.step.value / self.anneal_steps, 1.0)
        return self.temperature * (self.final_temperature / self.temperature) ** progress


def _build(context: registry.Context, anneal_steps: int, **settings: Any) -> GumbelQuantizer:
    calls = anneal_steps * context.calls
    return GumbelQuantizer(channels=context.channels, anneal_steps=calls, **settings)


registry.register(
    "gumbel", GumbelQuantizer, "Jang et al. 2016, arXiv:1611.01144; Ramesh et al. 2021, arXiv:2102.12092",
    "sampled indices with an annealed temperature, as in DALL-E; N x K probabilities in training",
    build=_build, codebook={"first": "K C", "offset": "K C"}, inner=True,
)  # fmt: skip
