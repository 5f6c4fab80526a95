"""The EMA vector quantizer: online k-means over latents (van den Oord et al. 2017, arXiv:1711.00937, appendix A.1)."""

from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vqrae_jax.quantizers import registry
from vqrae_jax.quantizers.arrays import AnyArray, Codebook, Indices, Mask, PerEmbedding, Rows
from vqrae_jax.quantizers.base import Quantized, Quantizer, Sample, batch_metrics, check_distance, flatten, vq_loss
from vqrae_jax.quantizers.codebook_losses import diversity
from vqrae_jax.quantizers.estimators import ESTIMATORS
from vqrae_jax.quantizers.kmeans import draw, start_codebook
from vqrae_jax.quantizers.nearest import nearest, unit
from vqrae_jax.quantizers.statistics import code_totals, gather_rows

REVIVAL_STEP = 0.1  # distance of a revived embedding from its parent, as a share of the way to the drawn latent
REVIVAL_SHARE = 16  # at most one embedding in 16 is revived in one step, which bounds the memory


class EMAQuantizer(Quantizer):
    """Embeddings are running means of the latents assigned to them; gradients train nothing here.

    State, in the mutable collection `batch_stats`, float32:
      codebook [K, C]: the embeddings.
      counts [K]: running number of latents per embedding and step. Starts at one: from zero, as in the PyTorch VQRAE,
        the first update divides by almost nothing, moves the embeddings far out, and the codebook collapses.
      sums [K, C]: running sum of these latents; codebook = sums / smoothed counts.
      step []: int32, number of updates, including the initialization.

    The output of a training step uses the codebook from before its update, but from after the initialization.

    In training, an embedding whose count is below revival_threshold times the mean count is dead. It moves next to an
    embedding in use (drawn in proportion to use, by a random latent of the batch, and towards that latent) and takes
    half of its count (Linde, Buzo & Gray 1980 split codebooks in this way). At the latent itself it would hardly win a
    second latent: in many channels latents are farther from each other than from means.
    """

    num_embeddings: registry.NumEmbeddings
    channels: registry.Channels
    commitment_cost: registry.CommitmentCost = 0.25
    vq_decay: Annotated[
        float, registry.Setting("decay of the running means per step, usually 0.99 to 0.999", "NAME")
    ] = 0.99
    vq_epsilon: Annotated[
        float, registry.Setting("pseudo-count of every embedding, so that no mean is divided by zero", "NAME")
    ] = 1e-5
    codebook_init: registry.InitSetting = "kmeans"
    revival_threshold: Annotated[
        float,
        registry.Setting(
            "share of the mean count below which an embedding is dead and moves, usually 0.1 to 0.5", "NAME"
        ),
    ] = 0.2
    # A constant decay keeps the initial codebook, fitted to one batch, for 1 / (1 - vq_decay) steps.
    decay_warmup: Annotated[bool, registry.Setting("limit the decay of step t to t / (t + 1), for short runs")] = True
    distance: registry.DistanceSetting = "l2"  # cosine: Yu et al. 2021, arXiv:2110.04627; angle: arXiv:2607.22148
    estimator: registry.EstimatorSetting = "straight_through"
    frozen: registry.Frozen = False
    # Running means receive no gradient: it spreads the latents, through the layers before the quantizer.
    diversity_cost: registry.DiversityCost = 0.0
    temperature: registry.Temperature = 1.0

    def __post_init__(self):
        check_distance(self.distance)
        super().__post_init__()

    def setup(self):
        shape = (self.num_embeddings, self.channels)
        self.codebook = self.variable("batch_stats", "codebook", self._draw_codebook)
        self.counts = self.variable("batch_stats", "counts", jnp.ones, shape[:1])
        self.sums = self.variable("batch_stats", "sums", lambda: jnp.copy(self.codebook.value))
        self.step = self.variable(
            "batch_stats", "step", lambda: jnp.asarray(int(self.codebook_init == "normal"), jnp.int32)
        )

    def __call__(self, z: Float[AnyArray, "*b C"], train: bool = False) -> Quantized:
        flat, finite = flatten(z, self.channels)
        flat = unit(flat) if self.distance == "cosine" else flat
        # Search and sums read z itself instead of the copy in which rows that are not finite are zero.
        fixed = flat if self.distance == "cosine" else z.reshape(flat.shape).astype(jnp.float32)
        fixed = jax.lax.stop_gradient(fixed)
        trains = train and not self.is_initializing()
        updates = jnp.any(finite) & (self.step.value > 0)  # the batch that initializes the codebook is already in it
        if trains:
            self.initialize(lambda: (fixed, finite), jnp.sum(finite))
        indices = nearest(fixed, self.codebook.value, self.distance)
        quantized = gather_rows(self.codebook.value, indices)
        metrics = batch_metrics(flat, quantized, indices, self.num_embeddings, finite)
        metrics["starved"] = jnp.sum(self._is_dead(self.counts.value), dtype=jnp.float32)
        loss = vq_loss(flat, quantized, finite, self.commitment_cost)
        if self.diversity_cost:
            codebook = jax.lax.stop_gradient(self.codebook.value)
            loss += self.diversity_cost * diversity(flat, codebook, finite, self.temperature)
        if trains and not self.frozen:
            metrics["revived"] = self._update(updates, fixed, finite, indices, metrics["counts"])
        out = ESTIMATORS[self.estimator](flat, quantized).reshape(z.shape)
        return Quantized(out, indices.reshape(z.shape[:-1]), loss, metrics)

    def embeddings(self) -> Codebook:
        return self.codebook.value

    def initialize(self, sample: Sample, count: Int[Array, ""]) -> None:
        """Makes the codebook, with counts and sums that the next update leaves in place."""
        if self.codebook_init == "normal" or self.is_initializing():
            return
        starts = (self.step.value == 0) & (count > 0)
        codebook, counts = start_codebook(self, starts, sample, self.codebook.value, self.counts.value)
        # An embedding without latents gets a small count, because sums / 0 has no value. If other embeddings have
        # latents it is dead nevertheless, until latents choose it or it is revived.
        least = count / self.num_embeddings * max(self.revival_threshold, 0.1)
        counts = jnp.where(starts, jnp.maximum(counts, least), counts)
        self.codebook.value, self.counts.value = codebook, counts
        self.sums.value = jnp.where(starts, codebook * self._smooth(counts)[:, None], self.sums.value)
        self.step.value = self.step.value + starts

    def _draw_codebook(self) -> Codebook:
        codebook = jax.random.normal(self.make_rng("params"), (self.num_embeddings, self.channels))
        return unit(codebook) if self.distance == "cosine" else codebook

    def _update(
        self, updates: Bool[Array, ""], flat: Rows, finite: Mask, indices: Indices, batch_counts: Int[Array, " K"]
    ) -> Int[Array, ""]:
        """Updates the running means from finite rows, if `updates`; returns how many embeddings were revived."""
        decay = jnp.asarray(self.vq_decay)
        if self.decay_warmup:
            decay = jnp.minimum(decay, self.step.value / (self.step.value + 1))
        decay = jnp.where(updates, decay, 1.0)
        counts = decay * self.counts.value + (1 - decay) * batch_counts
        totals = code_totals(flat, indices, self.num_embeddings, finite)
        sums = decay * self.sums.value + (1 - decay) * totals
        revived = jnp.zeros((), jnp.int32)
        if self.revival_threshold:
            counts, sums, revived = self._revive(updates, flat, finite, indices, counts, sums)
        codebook = sums / self._smooth(counts)[:, None]
        codebook = unit(codebook) if self.distance == "cosine" else codebook
        self.codebook.value = jnp.where(updates, codebook, self.codebook.value)
        self.counts.value, self.sums.value = counts, sums
        self.step.value = self.step.value + updates
        return revived

    def _revive(
        self, updates: Bool[Array, ""], flat: Rows, finite: Mask, indices: Indices, counts: PerEmbedding, sums: Codebook
    ) -> tuple[PerEmbedding, Codebook, Int[Array, ""]]:
        """Moves dead embeddings next to embeddings in use; returns counts, sums and how many moved."""
        # At most one per latent: two embeddings that move by the same latent would be equal.
        limit = min(-(-self.num_embeddings // REVIVAL_SHARE), len(flat))
        dead = jax.lax.top_k(-counts, limit)[1]
        latent = draw(self.make_rng("codes"), finite.astype(jnp.float32), limit)
        moves = self._is_dead(counts)[dead] & finite[latent] & updates
        parent = indices[latent]
        parts = 1.0 + jax.ops.segment_sum(moves.astype(jnp.float32), parent, self.num_embeddings)
        counts, sums = counts / parts, sums / parts[:, None]
        share = counts[parent]
        source = self.codebook.value[parent]
        rows = jnp.where(moves[:, None], source + REVIVAL_STEP * (flat[latent] - source), 0.0)
        index = jnp.where(moves, dead, self.num_embeddings)  # beyond the end: dropped
        counts = counts.at[index].set(share, mode="drop")
        sums = sums.at[index].set(rows * share[:, None], mode="drop")
        return counts, sums, jnp.sum(moves, dtype=jnp.int32)

    def _is_dead(self, counts: PerEmbedding) -> Bool[Array, " K"]:
        return counts < self.revival_threshold * jnp.mean(counts)

    def _smooth(self, counts: PerEmbedding) -> PerEmbedding:
        """Applies Laplace smoothing: no count is zero, and the total stays the same."""
        total = jnp.sum(counts)
        return (counts + self.vq_epsilon) / (total + self.num_embeddings * self.vq_epsilon) * total


registry.register(
    "ema", EMAQuantizer, "van den Oord et al. 2017, arXiv:1711.00937",
    "the default: fits frozen features at once and does not collapse",
    codebook={"codebook": "K C", "sums": "K C", "counts": "K"}, inner=True,
)  # fmt: skip
