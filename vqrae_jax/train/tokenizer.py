"""The training step of the tokenizer, its evaluation, and its images for the log."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, UInt8

from vqrae_jax import sharding
from vqrae_jax.evaluation import visualize
from vqrae_jax.evaluation.metrics import compare_pixels
from vqrae_jax.quantizers.arrays import AnyArray
from vqrae_jax.quantizers.nearest import nearest_other
from vqrae_jax.quantizers.statistics import code_counts
from vqrae_jax.train.objective import LossInputs
from vqrae_jax.train.optim import ema_decay, part_rates, update_ema
from vqrae_jax.train.task import Batch, Metrics, TrainState, is_sum
from vqrae_jax.train.tokenizer_state import PARTS, TokenizerVariables

# Variables that are zero until data have made the others.
STARTED = ("step", "begun", "fitted")


class TokenizerTask(TokenizerVariables):
    """Trains a tokenizer to reconstruct images: a `task.Task`."""

    inputs = ("image",)
    pictures = "reconstructions"

    def step(self, state: TrainState, frozen: Any, batch: Batch, horizon: jax.Array) -> tuple[TrainState, Metrics]:
        """Takes one optimizer step of the tokenizer, and the updates of the discriminator that belong to it."""
        key = jax.random.fold_in(self.key, state.step)
        images = self.micro_batches(to_float(batch["image"]))
        grads, batch_stats, reconstructions, metrics = self.mean_gradients(state, frozen, images, key)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params, horizon=horizon)
        params = optax.apply_updates(state.params, updates)
        ema = update_ema({n: state.ema_params[n] for n in params}, params, ema_decay(self.config.optimizer, state.step))
        adversary = state.adversary
        if self.adversary:
            adversary, adversary_metrics = self.adversary.update(
                adversary, frozen["discriminator"], reconstructions, images, state.step, horizon,
                jax.random.fold_in(key, 3),
            )  # fmt: skip
            metrics |= adversary_metrics
        metrics["grad_norm"] = optax.tree.norm(grads)
        metrics |= {f"grad_norm/{n}": optax.tree.norm(tree) for n, tree in grads.items()}
        metrics["learning_rate"] = part_rates(self.config.optimizer, state.step, horizon)["decoder"]
        state = TrainState(state.step + 1, params, state.ema_params | ema, batch_stats, opt_state, adversary)
        return state, metrics

    def gradients(
        self, state: TrainState, frozen: Any, images: jax.Array, key: jax.Array, batch_stats: Any
    ) -> tuple[Any, Any, jax.Array, jax.Array, Metrics]:
        """Returns gradients, updated batch_stats, latents, reconstructions and metrics of a micro-batch in [0, 1].

        The gradients of the adversarial and of the other terms with respect to the reconstruction are pulled back once.
        """

        def forward(params: Any) -> tuple[LossInputs, Any]:
            variables = self._variables(frozen, state.ema_params | params, batch_stats)
            options = self.config.train.code_noise, self.config.train.code_neighbors, self.objective.targets(frozen)
            out, updated = self.built.module.apply(
                variables, images, True, *options, method="forward", mutable=["batch_stats"], rngs=streams(key)
            )
            outputs = LossInputs(out.reconstruction, out.quantized.loss, out.encoded, out.features, out.target)
            return outputs, (updated["batch_stats"], out.quantized.metrics)

        outputs, pull_back, (updated, codebook_metrics) = jax.vjp(forward, state.params, has_aux=True)
        metrics = {n if n == "counts" else f"codebook/{n}": v for n, v in codebook_metrics.items()}
        terms = functools.partial(self.objective.terms, frozen=frozen, image=images, step=state.step)
        (total, values), cotangent = jax.value_and_grad(terms, has_aux=True)(outputs)
        metrics |= {f"loss/{n}": v for n, v in values.items()}
        if self.adversary:

            def pull_to_last_layer(gradient: jax.Array) -> jax.Array:
                zeros = jax.tree.map(jnp.zeros_like, outputs)
                # XLA computes only this leaf of everything that is pulled back.
                return pull_back(zeros.replace(reconstruction=gradient))[0]["decoder"]["pred"]["kernel"]

            term, gradient, term_metrics = self.adversary.generator_term(
                state.adversary, frozen["discriminator"], outputs.reconstruction, cotangent.reconstruction,
                pull_to_last_layer, state.step, jax.random.fold_in(key, 2),
            )  # fmt: skip
            total, metrics = total + term, metrics | term_metrics
            cotangent = cotangent.replace(reconstruction=cotangent.reconstruction + gradient)
        metrics["loss/total"] = total
        (grads,) = pull_back(cotangent)
        latents, reconstruction = jax.lax.stop_gradient((outputs.encoded, outputs.reconstruction))
        return grads, self._keep_frozen(batch_stats, updated), latents, reconstruction, metrics

    def mean_gradients(
        self, state: TrainState, frozen: Any, images: jax.Array, key: jax.Array
    ) -> tuple[Any, Any, jax.Array | None, Metrics]:
        """Averages `gradients` over micro-batches [parts, b, H, W, 3]; batch_stats change as by one large batch.

        All micro-batches start from the codebook from before its update, but from after its initialization.
        """
        gradients = functools.partial(self.gradients, state, frozen)
        if len(images) == 1:
            grads, batch_stats, _, reconstruction, metrics = gradients(images[0], key, state.batch_stats)
            return grads, batch_stats, reconstruction[None], metrics
        batch_stats = self._initialize(state, frozen, images, key)

        def add(total: Any, part: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
            grads, _, encoded, reconstruction, metrics = gradients(*part, batch_stats)
            total = jax.tree.map(lambda t, g: t + g / len(images), total, grads)
            # Only the discriminator needs the reconstructions.
            return total, (encoded, reconstruction if self.adversary else None, metrics)

        keys = jax.random.split(key, len(images))
        start = jax.tree.map(jnp.zeros_like, state.params)
        grads, (encoded, reconstructions, stacked) = jax.lax.scan(add, start, (images, keys))
        batch_stats, events = self._update_statistics(state, frozen, encoded, key)
        metrics = {n: v.sum(0) if is_sum(v) else v.mean(0) for n, v in stacked.items()} | events
        return grads, batch_stats, reconstructions, metrics

    def _initialize(self, state: TrainState, frozen: Any, images: jax.Array, key: jax.Array) -> Any:
        """Returns batch_stats in which state that starts from data is made from all micro-batches."""
        flags = [x for path, x in jax.tree.leaves_with_path(state.batch_stats) if path[-1].key in STARTED]
        if not flags or "quantizer" not in self.config.train.trainable:
            return state.batch_stats
        variables = self._variables(frozen, state.ema_params | state.params, state.batch_stats)

        def encode(image: jax.Array) -> jax.Array:
            return self.built.module.apply(variables, image, method=lambda model, x: model.encoder(x))

        # A loop of zero or one steps: unlike the branches of a condition, it keeps the sharding of the codebook.
        return jax.lax.fori_loop(
            0, jnp.any(jnp.stack(flags) == 0).astype(jnp.int32),
            lambda *_: self._update_statistics(state, frozen, jax.lax.map(encode, images), key)[0], state.batch_stats,
        )  # fmt: skip

    def _update_statistics(
        self, state: TrainState, frozen: Any, encoded: jax.Array, key: jax.Array
    ) -> tuple[Any, Metrics]:
        """Updates batch_stats once, by latents [parts, b, h, w, C] of all micro-batches; also returns its events."""
        variables = self._variables(frozen, state.ema_params | state.params, state.batch_stats)
        latents = jax.lax.stop_gradient(encoded.swapaxes(0, 1).reshape(-1, *encoded.shape[2:]))
        out, updated = self.built.module.apply(
            variables, latents, train=True, method="quantize", mutable=["batch_stats"], rngs=streams(key)
        )
        events = {f"codebook/{n}": out.metrics[n] for n in ("starved", "revived") if n in out.metrics}
        return self._keep_frozen(state.batch_stats, updated.get("batch_stats", {})), events

    def _keep_frozen(self, before: Any, updated: Any) -> Any:
        """Returns updated batch_stats, in which a quantizer that does not train is unchanged."""
        frozen = "quantizer" not in self.config.train.trainable and "quantizer" in before
        return {**before, **updated, **({"quantizer": before["quantizer"]} if frozen else {})}

    def micro_batches(self, images: jax.Array) -> jax.Array:
        """[B, ...] -> [parts, B / parts, ...]; part i has images i, i + parts, ... and so is on all devices."""
        parts = self.config.optimizer.accumulate
        return images.reshape(len(images) // parts, parts, *images.shape[1:]).swapaxes(0, 1)

    def evaluate(self, variables: Any, frozen: Any, batch: Batch) -> Metrics:
        images = to_float(batch["image"])
        out = self._reconstruct(variables, frozen, images)
        z = out.quantized.z
        rows = {
            "reconstruction": out.reconstruction,
            "code": z.reshape(len(z), -1, z.shape[-1]).astype(jnp.float32).mean(1),
            **compare_pixels(out.reconstruction, images, self.built.module.decoder.patch),
        }
        if (counts := out.quantized.metrics.get("counts")) is not None:
            rows["counts"] = masked_counts(out.quantized.indices, counts.shape, batch["mask"])
        return rows

    def log_metrics(self, state: TrainState, frozen: Any) -> Metrics:
        """Returns the mean distance of an embedding to its nearest other one, if there is a codebook."""
        variables = self._variables(frozen, state.ema_params | state.params, state.batch_stats)
        codebook = self.built.module.apply(variables, method=lambda model: model.quantizer.embeddings())
        return {} if codebook is None or len(codebook) < 2 else {"codebook/distance": nearest_other(codebook).mean()}

    def score(self, metrics: dict[str, int | float]) -> float | None:
        """Returns the validation PSNR."""
        return metrics.get("eval/psnr")

    def sample_images(self, variables: Any, frozen: Any, batch: Batch) -> UInt8[np.ndarray, "H W 3"]:
        """Returns a grid of the first images of a batch, their reconstructions, differences and indices."""
        images, decoded, indices = jax.device_get(self._jit_samples(variables, frozen, batch["image"]))
        grid = self.built.module.code_grid
        return visualize.reconstruction_grid(images, visualize.to_uint8(decoded), indices, grid)

    @functools.cached_property
    def _jit_samples(self) -> Any:
        def samples(variables: Any, frozen: Any, images: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
            images = images[: self.config.train.log_images]
            out = self._reconstruct(variables, frozen, to_float(images))
            return images, out.reconstruction, out.quantized.indices

        return jax.jit(samples, out_shardings=sharding.replicated(self.mesh))

    def _reconstruct(self, variables: Any, frozen: Any, images: jax.Array) -> Any:
        return self.built.module.apply(self._variables(frozen, **variables), images, method="forward")

    def _variables(self, frozen: Any, params: Any, batch_stats: Any) -> Any:
        return {"params": {n: frozen[n] for n in PARTS if n in frozen} | params, "batch_stats": batch_stats}


def streams(key: jax.Array) -> dict[str, jax.Array]:
    """Returns the random numbers of a forward pass in training."""
    noise, codes = jax.random.split(key)
    return {"noise": noise, "codes": codes}


def to_float(image: UInt8[AnyArray, "*b H W 3"]) -> Float[AnyArray, "*b H W 3"]:
    """Converts uint8 to [0, 1]; on the device, because bytes are four times cheaper to transfer."""
    return image.astype(jnp.float32) / 255


def masked_counts(indices: jax.Array, shape: tuple[int, ...], mask: jax.Array) -> jax.Array:
    """Counts each index in the images whose mask [B] is True; `shape` is [K], or [depth, K] for [B, ..., depth]."""
    levels = indices[..., None] if len(shape) == 1 else indices
    mask = jnp.broadcast_to(mask.reshape(-1, *[1] * (levels.ndim - 2)), levels.shape[:-1])
    return jax.vmap(lambda level: code_counts(level, shape[-1], mask), in_axes=-1)(levels).reshape(shape)
