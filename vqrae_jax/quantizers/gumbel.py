"""Gumbel-softmax quantization (Jang et al. 2016, arXiv:1611.01144; DALL-E: Ramesh et al. 2021, arXiv:2102.12092)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vqrae_jax.quantizers.base import Quantized, Quantizer, flatten, health, kept_mean
from vqrae_jax.quantizers.estimators import value_of
from vqrae_jax.quantizers.kmeans import First, Start
from vqrae_jax.quantizers.learned import LearnedCodebook
from vqrae_jax.quantizers.regularizers import orthogonality


class GumbelQuantizer(Quantizer):
    """A classifier picks the code; training samples it and passes gradients through the softmax of the noisy logits.

    The logits are linear in the latent, C -> K (`params`: logits), and the codebook is a `LearnedCodebook`; both learn
    from the decoder's gradient. With first codes c from data, z . c - |c|^2 / 2 is added to the logits, so that the
    likeliest code is at first the nearest one. Training holds N x K probabilities, as the method must. It draws from
    the rng stream "codes"; evaluation takes the likeliest code.

    Attributes:
      num_embeddings, channels: K and C.
      temperature, final_temperature, anneal_steps: of the softmax; geometric from the first to the second in so many
        calls with train=True (counted in `batch_stats`).
      kl_cost: weight of KL(softmax(logits) || uniform), which keeps codes in use.
      orthogonality_cost: weight of `regularizers.orthogonality` of the codes.
      start: see `LearnedCodebook`; "normal" is the papers'.
    """

    num_embeddings: int
    channels: int
    temperature: float = 1.0
    final_temperature: float = 0.1
    anneal_steps: int = 10_000
    kl_cost: float = 5e-4
    orthogonality_cost: float = 0.0
    start: Start = "kmeans"

    def setup(self):
        self.codebook = LearnedCodebook(self.num_embeddings, self.channels, self.start, "l2")
        initial = nn.initializers.lecun_normal() if self.start == "normal" else nn.initializers.zeros
        self.classifier = nn.Dense(
            self.num_embeddings, precision=jax.lax.Precision.HIGHEST, kernel_init=initial, name="logits"
        )
        self.step = self.variable("batch_stats", "step", lambda: jnp.zeros((), jnp.int32))

    def __call__(self, z: Float[Array, "*b C"], train: bool = False) -> Quantized:
        """Quantizes latents; train=True samples, counts the call, and makes the codes from the first latents."""
        flat, finite = flatten(z, self.channels)
        if train:
            fixed = jax.lax.stop_gradient(flat)
            self.initialize(lambda: (fixed, finite), jnp.sum(finite))
        codebook, logits = self.codebook(), self._logits(flat)
        sample = train and not self.is_initializing()
        noise = jax.random.gumbel(self.make_rng("codes"), logits.shape) if sample else 0.0
        indices = jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)
        codes = codebook[indices]
        soft = jax.nn.softmax((logits + noise) / self._temperature(), axis=-1)
        carrier = jnp.dot(soft, codebook, precision=jax.lax.Precision.HIGHEST)
        log_p = jax.nn.log_softmax(logits, axis=-1)
        kl = jnp.sum(jnp.exp(log_p) * log_p, axis=-1, keepdims=True) + np.log(self.num_embeddings)
        loss = self.kl_cost * kept_mean(kl, finite)
        if self.orthogonality_cost:
            loss += self.orthogonality_cost * orthogonality(codebook)
        if sample:
            self.step.value = self.step.value + 1
        return Quantized(
            z=value_of(codes, carrier).reshape(z.shape),
            indices=indices.reshape(z.shape[:-1]),
            loss=loss,
            metrics=health(flat, codes, indices, self.num_embeddings, finite),
        )

    def initialize(self, first: First, count: Int[Array, ""]) -> None:
        """As `LearnedCodebook.initialize`."""
        self.codebook.initialize(first, count)

    def lookup(self, indices: Int[Array, "*b"]) -> Float[Array, "*b C"]:
        """The codes of `indices`."""
        return self.codebook()[indices]

    def embeddings(self) -> Float[Array, "K C"]:
        return self.codebook()

    def _logits(self, flat: Float[Array, "N C"]) -> Float[Array, "N K"]:
        logits, first = self.classifier(flat), self.codebook.fixed()
        if self.start == "normal":
            return logits
        return logits + jnp.dot(flat, first.T, precision=jax.lax.Precision.HIGHEST) - 0.5 * jnp.sum(first**2, axis=1)

    def _temperature(self) -> Float[Array, ""]:
        done = jnp.minimum(self.step.value / self.anneal_steps, 1.0)
        return self.temperature * (self.final_temperature / self.temperature) ** done
