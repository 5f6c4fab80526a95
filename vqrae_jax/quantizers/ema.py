"""The EMA vector quantizer: online k-means over latents (van den Oord et al. 2017, arXiv:1711.00937, appendix A.1)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from vqrae_jax.quantizers.base import Quantized, Quantizer, flatten, health, vq_loss
from vqrae_jax.quantizers.entropy import diversity
from vqrae_jax.quantizers.estimators import ESTIMATORS, Estimator
from vqrae_jax.quantizers.kmeans import First, Start, begin, draw
from vqrae_jax.quantizers.lookup import look_up
from vqrae_jax.quantizers.nearest import Distance, nearest, unit
from vqrae_jax.quantizers.statistics import code_totals

REVIVAL_STEP = 0.1  # how far a revived code stands from its parent, as a share of the way to the latent that was drawn
REVIVAL_SHARE = 16  # at most one code in so many is revived in one step, which bounds the memory


class EMAQuantizer(Quantizer):
    """Codes are running means of the latents assigned to them; nothing here is trained by gradient.

    State, in the mutable collection `batch_stats`, float32:
      codebook [K, C]: the codes.
      counts [K]: running number of latents per code and step. Starts at one: from zero (the origin's start) the first
        update divides by almost nothing, throws the codes outwards and the codebook collapses.
      sums [K, C]: running sum of these latents; codebook = sums / smoothed counts.
      step []: int32, updates so far, the first codes counted as one.

    Statistics are taken over the whole batch, which under `jit` is the global one. The output of a training step uses
    the codes from before its update; the first codes are made before.

    Attributes:
      num_embeddings: codebook size K.
      channels: C.
      commitment_cost: weight of the commitment loss.
      decay, epsilon: of the running means; epsilon is the pseudo-count of Laplace smoothing.
      start: the first codes: "kmeans" clusters the first training batch, "data" takes random latents of it, "normal"
        draws from N(0, 1) before training.
      revival_threshold: in training, a code whose count falls below this share of the mean count is dead: it moves next
        to a code that is in use (chosen in proportion to use, through a random latent of the batch, and towards that
        latent), and takes over half of its count (Linde, Buzo & Gray 1980 split codes so). A code put on the latent
        itself would hardly win another one: in many channels latents are farther from each other than from means.
        0 switches it off.
      decay_warmup: until it reaches `decay`, the decay of step t is t / (t + 1), the plain mean of all batches so far;
        a constant decay keeps the first codes, fitted to one batch, for 1 / (1 - decay) steps.
      distance: "l2", or "cosine": latents and codes of unit length (Yu et al. 2021, arXiv:2110.04627).
      estimator: the gradient through the choice, see `estimators`.
      frozen: the first codes, or those of a state that has begun, never change.
      diversity_cost, temperature: weight of `entropy.diversity` of the soft codes, and its temperature. Running means
        take no gradient: it spreads the latents, through whatever is trained before the quantizer.

    Training draws from the rng stream "codes" for the first codes and for revival.
    """

    num_embeddings: int
    channels: int
    commitment_cost: float = 0.25
    decay: float = 0.99
    epsilon: float = 1e-5
    start: Start = "kmeans"
    revival_threshold: float = 0.2
    decay_warmup: bool = True
    distance: Distance = "l2"
    estimator: Estimator = "straight_through"
    frozen: bool = False
    diversity_cost: float = 0.0
    temperature: float = 1.0

    def setup(self):
        shape = (self.num_embeddings, self.channels)
        self.codebook = self.variable("batch_stats", "codebook", lambda: self._random_codes(self.make_rng("params")))
        self.counts = self.variable("batch_stats", "counts", jnp.ones, shape[:1])
        self.sums = self.variable("batch_stats", "sums", lambda: jnp.copy(self.codebook.value))
        self.step = self.variable("batch_stats", "step", lambda: jnp.asarray(int(self.start == "normal"), jnp.int32))

    def __call__(self, z: Float[Array, "*b C"], train: bool = False) -> Quantized:
        """Quantizes latents; train=True also updates the state, after it was used."""
        flat, finite = flatten(z, self.channels)
        # What searches and sums reads z itself, past the copy in which broken rows are zero.
        fixed = jax.lax.stop_gradient(z.reshape(flat.shape).astype(jnp.float32))
        if self.distance == "cosine":
            flat = unit(flat)
            fixed = jax.lax.stop_gradient(flat)
        trains = train and not self.is_initializing()
        learns = jnp.any(finite) & (self.step.value > 0)  # the batch that makes the codes is in them
        if trains:
            self.initialize(lambda: (fixed, finite), jnp.sum(finite))
        indices = nearest(fixed, self.codebook.value, self.distance)
        codes = look_up(self.codebook.value, indices)
        metrics = health(flat, codes, indices, self.num_embeddings, finite)
        metrics["starved"] = jnp.sum(self._is_dead(self.counts.value), dtype=jnp.float32)
        loss = vq_loss(flat, codes, finite, self.commitment_cost)
        if self.diversity_cost:
            codebook = jax.lax.stop_gradient(self.codebook.value)
            loss += self.diversity_cost * diversity(flat, codebook, finite, self.temperature)
        if trains and not self.frozen:
            metrics["revived"] = self._update(learns, fixed, finite, indices, metrics["counts"])
        return Quantized(
            z=ESTIMATORS[self.estimator](flat, codes, finite).reshape(z.shape),
            indices=indices.reshape(z.shape[:-1]),
            loss=loss,
            metrics=metrics,
        )

    def lookup(self, indices: Int[Array, "*b"]) -> Float[Array, "*b C"]:
        """The codes of `indices`."""
        return self.codebook.value[indices]

    def embeddings(self) -> Float[Array, "K C"]:
        return self.codebook.value

    def _random_codes(self, key: PRNGKeyArray) -> Float[Array, "K C"]:
        codes = jax.random.normal(key, (self.num_embeddings, self.channels))
        return unit(codes) if self.distance == "cosine" else codes

    def initialize(self, first: First, count: Int[Array, ""]) -> None:
        """Makes the codes if these are the first latents of training, of which `count` count.

        Their counts and sums leave them where they are.
        """
        if self.start == "normal" or self.is_initializing():
            return
        begins = (self.step.value == 0) & (count > 0)
        codes, counts = begin(
            begins, self.make_rng("codes"), first, self.codebook.value, self.counts.value, self.start, self.distance
        )
        # A code that stands for no latent gets a small count: at zero it would have no place (sums / counts). Where
        # other codes have latents it is dead for all that, until latents choose it or it is revived.
        least = count / self.num_embeddings * max(self.revival_threshold, 0.1)
        counts = jnp.where(begins, jnp.maximum(counts, least), counts)
        self.codebook.value, self.counts.value = codes, counts
        self.sums.value = jnp.where(begins, codes * self._smoothed(counts)[:, None], self.sums.value)
        self.step.value = self.step.value + begins

    def _update(
        self,
        learns: Bool[Array, ""],
        flat: Float[Array, "N C"],
        finite: Bool[Array, " N"],
        indices: Int[Array, " N"],
        found: Int[Array, " K"],
    ) -> Int[Array, ""]:
        """One step of the running means, if the codebook `learns`; returns how many codes were revived.

        Rows of `flat` that are not finite have no part in it.
        """
        decay = jnp.asarray(self.decay)
        if self.decay_warmup:
            decay = jnp.minimum(decay, self.step.value / (self.step.value + 1))
        decay = jnp.where(learns, decay, 1.0)
        counts = decay * self.counts.value + (1 - decay) * found
        totals = code_totals(flat, indices, self.num_embeddings, finite)
        sums = decay * self.sums.value + (1 - decay) * totals
        revived = jnp.zeros((), jnp.int32)
        if self.revival_threshold:
            counts, sums, revived = self._revive(self.make_rng("codes"), learns, flat, finite, indices, counts, sums)
        codes = sums / self._smoothed(counts)[:, None]
        codes = unit(codes) if self.distance == "cosine" else codes
        self.codebook.value = jnp.where(learns, codes, self.codebook.value)
        self.counts.value, self.sums.value = counts, sums
        self.step.value = self.step.value + learns
        return revived

    def _revive(
        self,
        key: PRNGKeyArray,
        allowed: Bool[Array, ""],
        flat: Float[Array, "N C"],
        finite: Bool[Array, " N"],
        indices: Int[Array, " N"],
        counts: Float[Array, " K"],
        sums: Float[Array, "K C"],
    ) -> tuple[Float[Array, " K"], Float[Array, "K C"], Int[Array, ""]]:
        """Dead codes split codes in use: new counts and sums, and how many codes moved."""
        # No more than there are latents: two codes that moved by the same latent would be one code twice.
        limit = min(-(-self.num_embeddings // REVIVAL_SHARE), len(flat))
        dead = jax.lax.top_k(-counts, limit)[1]
        latent = draw(key, finite.astype(jnp.float32), limit)
        moves = self._is_dead(counts)[dead] & finite[latent] & allowed
        parent = indices[latent]
        parts = 1.0 + jax.ops.segment_sum(moves.astype(jnp.float32), parent, self.num_embeddings)
        counts, sums = counts / parts, sums / parts[:, None]
        share = counts[parent]
        origin = self.codebook.value[parent]
        codes = jnp.where(moves[:, None], origin + REVIVAL_STEP * (flat[latent] - origin), 0.0)
        place = jnp.where(moves, dead, self.num_embeddings)  # beyond the end: dropped
        return (
            counts.at[place].set(share, mode="drop"),
            sums.at[place].set(codes * share[:, None], mode="drop"),
            jnp.sum(moves, dtype=jnp.int32),
        )

    def _is_dead(self, counts: Float[Array, " K"]) -> Bool[Array, " K"]:
        return counts < self.revival_threshold * jnp.mean(counts)

    def _smoothed(self, counts: Float[Array, " K"]) -> Float[Array, " K"]:
        """Laplace smoothing: no count is zero, and the total stays what it was."""
        total = jnp.sum(counts)
        return (counts + self.epsilon) / (total + self.num_embeddings * self.epsilon) * total
