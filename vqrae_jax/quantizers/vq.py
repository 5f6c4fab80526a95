"""The codebook of VQGAN and LlamaGen, trained by gradients (Esser et al. 2021, arXiv:2012.09841)."""

from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vqrae_jax.errors import ConfigError
from vqrae_jax.quantizers import registry
from vqrae_jax.quantizers.arrays import AnyArray, Codebook
from vqrae_jax.quantizers.base import Quantized, Quantizer, Sample, batch_metrics, check_distance, flatten, vq_loss
from vqrae_jax.quantizers.codebook_losses import diversity
from vqrae_jax.quantizers.estimators import ESTIMATORS
from vqrae_jax.quantizers.kmeans import LearnedCodebook
from vqrae_jax.quantizers.nearest import nearest, unit


class VQ(Quantizer):
    """The nearest embedding; the codebook loss moves embeddings to their latents.

    The codebook is a `LearnedCodebook`. With the distance "cosine" latents and embeddings have unit length (LlamaGen,
    arXiv:2406.06525, with 8 channels); with "angle" embeddings keep their length, and the codebook loss is 1 - cosine.
    An embedding without latents gets no gradient: at a learning rate of its own, constant, fewer of them stay unused,
    and with `revival_decay` they move to latents, after the call has used the codebook, so that quantizers which call
    it several times in one step cannot have it.
    """

    num_embeddings: registry.NumEmbeddings
    channels: registry.Channels
    commitment_cost: registry.CommitmentCost = 0.25
    codebook_init: registry.InitSetting = "kmeans"
    distance: registry.DistanceSetting = "l2"
    estimator: registry.EstimatorSetting = "straight_through"
    frozen: registry.Frozen = False
    diversity_cost: registry.DiversityCost = 0.0
    temperature: registry.Temperature = 1.0
    codebook_cost: Annotated[
        float,
        registry.Setting(
            "weight of the codebook loss, usually 1; 0 with estimator=diveq, which trains embeddings by the decoder's "
            "gradient", ge=0,
        ),
    ] = 1.0  # fmt: skip
    revival_decay: Annotated[
        float,
        registry.Setting(
            "decay per step of the counts of use by which unused embeddings move to latents (CVQ-VAE), usually 0.99; "
            "0: none move", ge=0, le=1,
        ),
    ] = 0.0  # fmt: skip

    def __post_init__(self):
        check_distance(self.distance)
        super().__post_init__()

    def setup(self):
        self.codebook = LearnedCodebook(
            self.num_embeddings, self.channels, self.codebook_init, self.distance, self.revival_decay
        )

    def __call__(self, z: Float[AnyArray, "*b C"], train: bool = False) -> Quantized:
        flat, finite = flatten(z, self.channels)
        flat = unit(flat) if self.distance == "cosine" else flat
        if train:
            fixed, has_begun = jax.lax.stop_gradient(flat), self.codebook.has_begun()
            self.initialize(lambda: (fixed, finite), jnp.sum(finite))
        codebook = jax.lax.stop_gradient(self.embeddings()) if self.frozen else self.embeddings()
        indices = nearest(flat, codebook, self.distance)
        quantized = codebook[indices]
        loss = vq_loss(flat, quantized, finite, self.commitment_cost, self.codebook_cost, self.distance)
        if self.diversity_cost:
            loss += self.diversity_cost * diversity(flat, codebook, finite, self.temperature)
        out = ESTIMATORS[self.estimator](flat, quantized).reshape(z.shape)
        metrics = batch_metrics(flat, quantized, indices, self.num_embeddings, finite)
        if train and self.revival_decay and not (self.frozen or self.is_initializing()):
            # Not the codebook that this call makes: the micro-batches of its step use it afterwards.
            metrics["revived"] = self.codebook.revive(fixed, finite & has_begun, metrics["counts"])
        return Quantized(out, indices.reshape(z.shape[:-1]), loss, metrics)

    def initialize(self, sample: Sample, count: Int[Array, ""]) -> None:
        self.codebook.initialize(sample, count)

    def embeddings(self) -> Codebook:
        return unit(self.codebook()) if self.distance == "cosine" else self.codebook()


def _build(context: registry.Context, revival_decay: float, **settings: Any) -> VQ:
    if revival_decay and context.calls > 1:
        message = "must be 0 for a codebook that several scales or levels share: each would move what the others use"
        raise ConfigError(message, field="revival_decay", value=revival_decay)
    return VQ(channels=context.channels, revival_decay=revival_decay, **settings)


registry.register(
    "vq", VQ, "Esser et al. 2021, arXiv:2012.09841; Sun et al. 2024, arXiv:2406.06525",
    "VQGAN's and LlamaGen's codebook, trained by gradients; unused codes stay unused without revival_decay",
    build=_build, codebook={"first": "K C", "offset": "K C", "uses": "K"}, inner=True,
)  # fmt: skip
