"""SimVQ: a frozen codebook behind one learned linear map (Zhu et al. 2024, arXiv:2411.02038)."""

import functools
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vqrae_jax.errors import ConfigError
from vqrae_jax.quantizers import registry
from vqrae_jax.quantizers.arrays import AnyArray, Codebook
from vqrae_jax.quantizers.base import Quantized, Quantizer, Sample, batch_metrics, check_distance, flatten, vq_loss
from vqrae_jax.quantizers.codebook_losses import diversity, orthogonality
from vqrae_jax.quantizers.estimators import ESTIMATORS
from vqrae_jax.quantizers.kmeans import start_variable
from vqrae_jax.quantizers.nearest import nearest, unit
from vqrae_jax.quantizers.vqbridge import VQBridge


class SimVQ(Quantizer):
    """Embeddings are W e + b with fixed e: one gradient moves all of them, so none stays unused.

    In the paper e is random. Random directions are all far from frozen features, which have a large mean: two of 2,048
    embeddings then win every latent. So here e comes from the first training batch, and W and the projection of the
    input start as the identity.

    With `bridge_group` a `VQBridge` takes the place of W and b, as in FVQ (arXiv:2509.10140), where e trains as well.

    `params`: codebook_projection (W, b or the bridge) and, with input_projection, input_projection. `batch_stats`:
    codebook [K, C], the fixed vectors e; begun [], 1 once they are made.
    """

    num_embeddings: registry.NumEmbeddings
    channels: registry.Channels
    commitment_cost: registry.CommitmentCost = 0.25
    codebook_init: registry.InitSetting = "kmeans"  # "normal", the paper's: e and both projections are random
    distance: registry.DistanceSetting = "cosine"
    # The commitment loss can vanish by moving all latents together: frozen features then use half as many embeddings.
    input_projection: Annotated[
        bool,
        registry.Setting("map the latents by a learned linear map, which nothing inverts, as in the PyTorch VQRAE"),
    ] = False
    legacy: Annotated[
        bool, registry.Setting("let commitment_cost weigh the codebook loss instead, as in VQGAN and the PyTorch VQRAE")
    ] = True
    estimator: registry.EstimatorSetting = "straight_through"
    orthogonality_cost: registry.OrthogonalityCost = 0.0
    diversity_cost: registry.DiversityCost = 0.0
    temperature: registry.Temperature = 1.0
    bridge_group: Annotated[
        int,
        registry.Setting(
            "embeddings per token of a transformer that maps the codebook (FVQ), usually 16, and 64 from 65,536 "
            "embeddings; 0: a linear map", ge=0, le=65_536,
        ),
    ] = 0  # fmt: skip

    def __post_init__(self):
        check_distance(self.distance)
        if self.bridge_group and self.num_embeddings % self.bridge_group:
            message = f"must be 0 or divide the {self.num_embeddings} embeddings"
            raise ConfigError(message, field="bridge_group", value=self.bridge_group)
        super().__post_init__()

    def setup(self):
        shape, scale = (self.num_embeddings, self.channels), self.channels**-0.5
        self.codebook = self.variable(
            "batch_stats", "codebook", lambda: scale * jax.random.normal(self.make_rng("params"), shape)
        )
        self.begun = self.variable(
            "batch_stats", "begun", lambda: jnp.asarray(int(self.codebook_init == "normal"), jnp.int32)
        )
        initial = nn.initializers.lecun_normal() if self.codebook_init == "normal" else _identity
        linear = functools.partial(nn.Dense, self.channels, precision=jax.lax.Precision.HIGHEST, kernel_init=initial)
        self.codebook_projection = VQBridge(self.bridge_group) if self.bridge_group else linear()
        if self.input_projection:
            self.projection = linear(name="input_projection")

    def __call__(self, z: Float[AnyArray, "*b C"], train: bool = False) -> Quantized:
        flat, finite = flatten(z, self.channels)
        flat = self.projection(flat) if self.input_projection else flat
        flat = unit(flat) if self.distance == "cosine" else flat
        if train:
            fixed = jax.lax.stop_gradient(flat)
            self.initialize(lambda: (fixed, finite), jnp.sum(finite))
        codebook = self.embeddings()
        indices = nearest(flat, codebook, self.distance)
        quantized = codebook[indices]
        costs = (1.0, self.commitment_cost) if self.legacy else (self.commitment_cost, 1.0)
        loss = vq_loss(flat, quantized, finite, *costs, self.distance)
        if self.orthogonality_cost:
            loss += self.orthogonality_cost * orthogonality(codebook)
        if self.diversity_cost:
            loss += self.diversity_cost * diversity(flat, codebook, finite, self.temperature)
        out = ESTIMATORS[self.estimator](flat, quantized).reshape(z.shape)
        metrics = batch_metrics(flat, quantized, indices, self.num_embeddings, finite)
        return Quantized(out, indices.reshape(z.shape[:-1]), loss, metrics)

    def initialize(self, sample: Sample, count: Int[Array, ""]) -> None:
        start_variable(self, self.codebook, self.begun, sample, count)

    def embeddings(self) -> Codebook:
        # The whole codebook even for a few indices: a product of another shape could round differently.
        embeddings = self.codebook_projection(self.codebook.value)
        return unit(embeddings) if self.distance == "cosine" else embeddings


def _identity(key: PRNGKeyArray, shape: tuple[int, int], dtype: Any) -> Float[Array, "C C"]:
    return jnp.eye(*shape, dtype=dtype)


registry.register(
    "simvq", SimVQ, "Zhu et al. 2024, arXiv:2411.02038", "one gradient moves the whole codebook; directions by default",
    codebook={"codebook": "K C"}, inner=True,
)  # fmt: skip
