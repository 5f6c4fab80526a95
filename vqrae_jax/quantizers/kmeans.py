"""Codebooks that start from the first training batch: k-means, random latents, and learned offsets from them.

Seeds are drawn with probability proportional to the squared distance to the nearest seed (k-means++, Arthur &
Vassilvitskii 2007), in a few rounds of many seeds (k-means||, Bahmani et al. 2012, arXiv:1203.6402), because one seed
per round would take K passes. Lloyd's iterations follow. All operations are on the global batch.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from vqrae_jax.quantizers.arrays import AnyArray, Codebook, Mask, PerEmbedding, PerRow, Rows
from vqrae_jax.quantizers.base import Sample
from vqrae_jax.quantizers.nearest import Distance, nearest, nearest_with_distance, unit
from vqrae_jax.quantizers.statistics import code_counts, code_totals, gather_rows

CodebookInit = Literal["kmeans", "data", "normal"]

ROUNDS = 8  # of seeding
ITERATIONS = 5  # of Lloyd; on image features further iterations hardly change the error on unseen images


def kmeans(
    key: PRNGKeyArray, z: Rows, codebook: Codebook, mask: Mask, distance: Distance = "l2"
) -> tuple[Codebook, PerEmbedding]:
    """Returns K embeddings and the number of latents of each.

    With fewer latents than embeddings, surplus embeddings repeat latents and count none.

    Args:
      z: latents, of unit length if the distance is "cosine". Rows outside `mask` may be NaN.
      codebook: gives K and the sharding; its values are not read.
    """
    codebook = _draw_seeds(key, z, codebook, mask)

    # The search is float32 from the start: in a loop around a bfloat16 screening, XLA would store all rows in bfloat16.
    def iterate(_, codebook):
        indices = nearest(z, codebook, distance, "float32")
        counts = code_counts(indices, len(codebook), mask)
        means = code_totals(z, indices, len(codebook), mask) / jnp.maximum(counts, 1)[:, None]
        means = unit(means) if distance == "cosine" else means
        return jnp.where(counts[:, None] > 0, means, codebook)

    codebook = jax.lax.fori_loop(0, ITERATIONS, iterate, codebook)
    counts = code_counts(nearest(z, codebook, distance, "float32"), len(codebook), mask)
    return codebook, counts.astype(jnp.float32)


def start_codebook(
    module: nn.Module, starts: Bool[AnyArray, ""], sample: Sample, codebook: Codebook, counts: PerEmbedding
) -> tuple[Codebook, PerEmbedding]:
    """Returns embeddings made from latents and the number of latents of each if `starts`, otherwise the arguments.

    Args:
      module: has the attributes `distance`, and `codebook_init`: "kmeans" clusters latents; "data" takes random ones,
        with counts of zero.
      sample: is computed only if `starts`. For "cosine" its latents are scaled to unit length.
    """
    key = module.make_rng("codes")

    def make(_, state):
        z, mask = sample()
        z = unit(z) if module.distance == "cosine" else z
        if module.codebook_init == "kmeans":
            return kmeans(key, z, state[0], mask, module.distance)
        rows = draw(key, mask.astype(jnp.float32), len(codebook))
        return jnp.where(mask[rows][:, None], z[rows], 0.0), jnp.zeros_like(counts)

    # A loop of zero or one steps: unlike the branches of a condition, it keeps the sharding of the codebook.
    return jax.lax.fori_loop(0, starts.astype(jnp.int32), make, (codebook, counts))


def start_variable(
    module: nn.Module, codebook: nn.Variable, begun: nn.Variable, sample: Sample, count: Int[AnyArray, ""]
) -> None:
    """Makes the codebook of a module, see `start_codebook`, unless it has begun or `count` is zero."""
    if module.codebook_init == "normal" or module.is_initializing():
        return
    starts, counts = (begun.value == 0) & (count > 0), jnp.zeros(len(codebook.value))
    codebook.value, _ = start_codebook(module, starts, sample, codebook.value, counts)
    begun.value = begun.value | starts


def draw(key: PRNGKeyArray, weights: PerRow, count: int) -> Int[Array, " count"]:
    """Draws indices with probability proportional to the weights, without repetition until all are drawn.

    They are the largest of log weight + Gumbel noise (Efraimidis & Spirakis 2006), equal on every device.
    """
    noisy = jnp.log(weights) + jax.random.gumbel(key, weights.shape)
    _, order = jax.lax.top_k(noisy, min(count, len(weights)))
    return order[jnp.arange(count) % len(order)]


def _draw_seeds(key: PRNGKeyArray, z: Rows, codebook: Codebook, mask: Mask) -> Codebook:
    size, channels = codebook.shape
    rounds = next(r for r in range(min(size, ROUNDS), 0, -1) if size % r == 0)

    def add(i, state):
        gap, seeds = state
        rows = draw(jax.random.fold_in(key, i), jnp.where(mask, gap, 0.0), size // rounds)
        new = jnp.where(mask[rows][:, None], z[rows], 0.0)
        _, distance = nearest_with_distance(z, new, block="float32")
        # Round i fills rows i, i + rounds, ...: a codebook that is sharded over its rows stays sharded.
        return jnp.minimum(gap, distance), jax.lax.dynamic_update_index_in_dim(seeds, new, i, axis=1)

    seeds = codebook.reshape(-1, rounds, channels)
    _, seeds = jax.lax.fori_loop(0, rounds, add, (jnp.ones(len(z)), seeds))
    return seeds.reshape(size, channels)


class LearnedCodebook(nn.Module):
    """A codebook `first` + `offset`: latents of the first batch (state), and what gradients add to them (parameters).

    Random embeddings lie far from all latents: a few of them win every latent and the others never learn.

    `params`: offset [K, C]. `batch_stats`, unless codebook_init is "normal": first [K, C]; begun [], 1 after the first
    batch. With a `revival_decay` also first, and uses [K]: the decayed sum of how often each embedding was chosen,
    relative to even use.
    """

    num_embeddings: int
    channels: int
    codebook_init: CodebookInit  # "normal": random embeddings of about unit length, before training
    distance: Distance
    revival_decay: float = 0.0

    @property
    def _has_first(self) -> bool:
        return self.codebook_init != "normal" or self.revival_decay > 0

    def setup(self):
        shape, normal = (self.num_embeddings, self.channels), nn.initializers.normal(self.channels**-0.5)
        self.offset = self.param("offset", nn.initializers.zeros if self._has_first else normal, shape)
        if self._has_first:
            self.first = self.variable("batch_stats", "first", lambda: normal(self.make_rng("params"), shape))
        if self.codebook_init != "normal":
            self.begun = self.variable("batch_stats", "begun", lambda: jnp.zeros((), jnp.int32))
        if self.revival_decay:
            self.uses = self.variable("batch_stats", "uses", jnp.zeros, shape[:1])

    def __call__(self) -> Codebook:
        return self.offset + self.fixed() if self._has_first else self.offset

    def has_begun(self) -> Bool[AnyArray, ""]:
        """Returns whether the embeddings are made."""
        return self.begun.value > 0 if self.codebook_init != "normal" else jnp.asarray(True)

    def fixed(self) -> Codebook | float:
        """Returns the part of the embeddings that gradients do not change."""
        return jax.lax.stop_gradient(self.first.value) if self._has_first else 0.0

    def initialize(self, sample: Sample, count: Int[AnyArray, ""]) -> None:
        if self.codebook_init != "normal":
            start_variable(self, self.first, self.begun, sample, count)

    def revive(self, z: Rows, mask: Mask, counts: Int[AnyArray, " K"]) -> Int[Array, ""]:
        """Moves embeddings that are hardly used to latents (CVQ-VAE, Zheng & Vedaldi 2023, arXiv:2307.15139).

        Every embedding e becomes e + alpha (anchor - e), with a random latent of the batch as its anchor and alpha =
        exp(-10 uses - 0.001): 0.999 without uses, below 0.1 from 0.23 uses. The paper's running mean of the share of an
        embedding is (1 - decay) uses / K. Its anchors that are drawn by distance would need N x K probabilities.

        Args:
          z: latents; those outside `mask` are no anchors; without anchors no embedding moves.
          counts: how often each embedding was chosen in this batch.

        Returns:
          The number of embeddings that moved more than half of the way.
        """
        total = jnp.sum(counts)
        uses = self.revival_decay * self.uses.value + counts * (self.num_embeddings / jnp.maximum(total, 1))
        rows = draw(self.make_rng("codes"), mask.astype(jnp.float32), self.num_embeddings)
        alpha = jnp.where(mask[rows], jnp.exp(-10 * uses - 1e-3), 0.0)
        # Not the offset, because optimizers keep moments of parameters.
        self.first.value += alpha[:, None] * (gather_rows(z, rows) - jax.lax.stop_gradient(self()))
        self.uses.value = jnp.where(total > 0, uses, self.uses.value)
        return jnp.sum(alpha > 0.5, dtype=jnp.int32)
