"""Gumbel-softmax quantization (Jang et al. 2016, arXiv:1611.01144; DALL-E: Ramesh et al. 2021, arXiv:2102.12092)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vqrae_jax.quantizers.base import Quantized, flatten, health, kept_mean
from vqrae_jax.quantizers.estimators import value_of
from vqrae_jax.quantizers.regularizers import orthogonality


class GumbelQuantizer(nn.Module):
    """A classifier picks the code; training samples it and passes gradients through the softmax of the noisy logits.

    `params`: logits (linear, C -> K) and codebook [K, C]; both learn from the decoder's gradient. Training holds N x K
    probabilities, as the method must. It draws from the rng stream "codes"; evaluation takes the likeliest code.

    Attributes:
      num_embeddings, channels: K and C.
      temperature, final_temperature, anneal_steps: of the softmax; geometric from the first to the second in so many
        training steps (counted in `batch_stats`).
      kl_cost: weight of KL(softmax(logits) || uniform), which keeps codes in use.
      orthogonality_cost: weight of `regularizers.orthogonality` of the codes.
    """

    num_embeddings: int
    channels: int
    temperature: float = 1.0
    final_temperature: float = 0.1
    anneal_steps: int = 10_000
    kl_cost: float = 5e-4
    orthogonality_cost: float = 0.0

    def setup(self):
        shape = (self.num_embeddings, self.channels)
        self.codebook = self.param("codebook", nn.initializers.normal(self.channels**-0.5), shape)
        self.classifier = nn.Dense(self.num_embeddings, precision=jax.lax.Precision.HIGHEST, name="logits")
        self.step = self.variable("batch_stats", "step", lambda: jnp.zeros((), jnp.int32))

    def __call__(self, z: Float[Array, "*b C"], train: bool = False) -> Quantized:
        """Quantizes latents; train=True samples and counts the step."""
        flat, finite = flatten(z, self.channels)
        logits = self.classifier(flat)
        sample = train and not self.is_initializing()
        noise = jax.random.gumbel(self.make_rng("codes"), logits.shape) if sample else 0.0
        indices = jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)
        codes = self.codebook[indices]
        soft = jax.nn.softmax((logits + noise) / self._temperature(), axis=-1)
        carrier = jnp.dot(soft, self.codebook, precision=jax.lax.Precision.HIGHEST)
        log_p = jax.nn.log_softmax(logits, axis=-1)
        kl = jnp.sum(jnp.exp(log_p) * log_p, axis=-1, keepdims=True) + np.log(self.num_embeddings)
        loss = self.kl_cost * kept_mean(kl, finite)
        if self.orthogonality_cost:
            loss += self.orthogonality_cost * orthogonality(self.codebook)
        if sample:
            self.step.value = self.step.value + 1
        return Quantized(
            z=value_of(codes, carrier).reshape(z.shape),
            indices=indices.reshape(z.shape[:-1]),
            loss=loss,
            metrics=health(flat, codes, indices, self.num_embeddings, finite),
        )

    def lookup(self, indices: Int[Array, "*b"]) -> Float[Array, "*b C"]:
        """The codes of `indices`."""
        return self.codebook[indices]

    def codes(self) -> Float[Array, "K C"]:
        return self.codebook

    def _temperature(self) -> Float[Array, ""]:
        done = jnp.minimum(self.step.value / self.anneal_steps, 1.0)
        return self.temperature * (self.final_temperature / self.temperature) ** done
