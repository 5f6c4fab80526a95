"""The tokenizer's task: reconstruct images through a discrete code."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from vqrae_jax import assembly, sharding
from vqrae_jax.config import Config, ConfigError
from vqrae_jax.evaluation.psnr import psnr
from vqrae_jax.inference import pictures
from vqrae_jax.losses import pixel
from vqrae_jax.quantizers.statistics import code_counts
from vqrae_jax.train.optim import ema_decay, learning_rate, make_optimizer, update_ema
from vqrae_jax.train.state import TrainState
from vqrae_jax.train.task import Metrics

PARTS = ("encoder", "quantizer", "decoder")


@dataclasses.dataclass(frozen=True)
class TokenizerTask:
    """Encoder, quantizer and decoder; what of them trains is in `config.train.trainable`."""

    config: Config
    mesh: Mesh
    assembly: assembly.Assembly

    @classmethod
    def build(cls, config: Config, mesh: Mesh) -> "TokenizerTask":
        """Reads the pretrained weights and checks what model, data and training ask of each other."""
        pin = functools.partial(sharding.pin_batch, mesh=mesh)
        built = assembly.assemble(config.model, pin=pin)
        if "encoder" not in config.train.trainable:
            built = assembly.for_frozen_encoder(built)
        task = cls(config, mesh, built)
        painted, given = task.assembly.image_size, config.data.image_size
        if painted != given:
            grid = task.assembly.module.decoder.grid
            fits = f"model.decoder_patch_size={given // grid} or " if given % grid == 0 else ""
            raise ConfigError(
                f"model.decoder_patch_size={config.model.decoder_patch_size} x the latent grid of {grid} paints "
                f"pictures of {painted} pixels, but data.image_size={given}: set {fits}data.image_size={painted}"
            )
        return task

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(self.config.optimizer, self.config.train.steps)

    def shapes(self) -> TrainState:
        shapes = assembly.shapes(self.assembly)
        params = {n: tree for n, tree in shapes["params"].items() if n in self.config.train.trainable}
        if not params:
            raise ConfigError(
                f"train.trainable={self.config.train.trainable}: none of these parts has parameters; choose from "
                f"{', '.join(PARTS)}"
            )
        state = jax.eval_shape(self._create, params, shapes["batch_stats"])
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state, self._place(state)
        )

    def init(self) -> TrainState:
        where = jax.tree.map(lambda x: x.sharding, self.shapes())
        trainable = self.config.train.trainable
        variables = assembly.initial_variables(self.assembly, self._key(), trainable, self._place)
        create = jax.jit(self._create, out_shardings=where, donate_argnums=(0, 1))
        return create(variables["params"], variables["batch_stats"])

    def frozen(self) -> Any:
        parts = [n for n in PARTS if n not in self.config.train.trainable]
        return assembly.initial_params(self.assembly, self._key(), parts, self._place)

    def _create(self, params: Any, batch_stats: Any) -> TrainState:
        ema = jax.tree.map(jnp.copy, params)
        return TrainState(jnp.zeros((), jnp.int32), params, ema, batch_stats, self.optimizer.init(params))

    def _key(self) -> jax.Array:
        return jax.random.key(self.config.train.seed)

    def _place(self, tree: Any) -> Any:
        given = self.config.mesh
        return sharding.shardings(tree, self.mesh, given.fsdp, given.fsdp_min_size)

    def step(self, state: TrainState, frozen: Any, batch: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(self._key(), state.step)
        images = to_float(batch["image"])
        grads, batch_stats, metrics = self._gradients(state, frozen, images, key)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["grad_norm"] = optax.tree.norm(grads)
        metrics["learning_rate"] = learning_rate(self.config.optimizer, self.config.train.steps)(state.step)
        return TrainState(
            step=state.step + 1,
            params=params,
            ema_params=update_ema(state.ema_params, params, ema_decay(self.config.optimizer, state.step)),
            batch_stats=batch_stats,
            opt_state=opt_state,
        ), metrics

    def loss(
        self, params: Any, batch_stats: Any, frozen: Any, images: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        """The total loss of a micro-batch, the updated batch_stats, and what to log."""
        variables = {"params": {**frozen, **params}, "batch_stats": batch_stats}
        noise, codes = jax.random.split(key)
        out, updated = self.assembly.module.apply(
            variables, images, train=True, method="forward", mutable=["batch_stats"],
            rngs={"noise": noise, "codes": codes},
        )  # fmt: skip
        weights = self.config.loss
        pixel_loss = pixel.LOSSES[weights.pixel](out.reconstruction, images)
        total = weights.pixel_weight * pixel_loss + weights.vq_weight * out.quantized.loss
        metrics = {"loss/total": total, "loss/pixel": pixel_loss, "loss/vq": out.quantized.loss}
        metrics |= {n if n == "counts" else f"codebook/{n}": v for n, v in out.quantized.metrics.items()}
        return total, (updated["batch_stats"], metrics)

    def _gradients(self, state: TrainState, frozen: Any, images: jax.Array, key: jax.Array) -> tuple[Any, Any, Metrics]:
        """Mean gradients over the micro-batches; the codebook is updated after each of them."""
        gradient = jax.grad(self.loss, has_aux=True)
        parts = self.config.optimizer.accumulate
        if parts == 1:
            grads, (batch_stats, metrics) = gradient(state.params, state.batch_stats, frozen, images, key)
            return grads, batch_stats, metrics
        # Micro-batch i takes images i, i + parts, ...: so each stays spread over all devices.
        micro = images.reshape(len(images) // parts, parts, *images.shape[1:]).swapaxes(0, 1)

        def add(carry: tuple[Any, Any], part: tuple[jax.Array, jax.Array]) -> tuple[tuple[Any, Any], Metrics]:
            total, batch_stats = carry
            grads, (batch_stats, metrics) = gradient(state.params, batch_stats, frozen, *part)
            return (jax.tree.map(lambda t, g: t + g / parts, total, grads), batch_stats), metrics

        start = (jax.tree.map(jnp.zeros_like, state.params), state.batch_stats)
        (grads, batch_stats), stacked = jax.lax.scan(add, start, (micro, jax.random.split(key, parts)))
        return grads, batch_stats, {n: v.sum(0) if n == "counts" else v.mean(0) for n, v in stacked.items()}

    def evaluate_batch(self, variables: Any, frozen: Any, batch: dict[str, jax.Array]) -> Metrics:
        images, mask = to_float(batch["image"]), batch["mask"]
        out = self._forward(variables, frozen, images)
        sums = {"psnr": jnp.where(mask, psnr(out.reconstruction, images), 0).sum(), "images": mask.sum()}
        if "counts" in out.quantized.metrics:
            sums["counts"] = masked_counts(out.quantized.indices, out.quantized.metrics["counts"].shape, mask)
        return sums

    def pictures(self, variables: Any, frozen: Any, batch: dict[str, jax.Array]) -> Any:
        images = batch["image"][: self.config.train.pictures]
        out = self._forward(variables, frozen, to_float(images))
        return images, out.reconstruction, out.quantized.indices

    def draw(self, arrays: Any) -> np.ndarray:
        images, reconstructions, indices = arrays
        return pictures.reconstruction_grid(
            images, pictures.to_uint8(reconstructions), indices, self.assembly.module.encoder.grid
        )

    def _forward(self, variables: Any, frozen: Any, images: jax.Array) -> Any:
        variables = {**variables, "params": {**frozen, **variables["params"]}}
        return self.assembly.module.apply(variables, images, method="forward")


def to_float(image: jax.Array) -> jax.Array:
    """uint8 -> [0, 1]; on the device, because bytes are four times cheaper to send."""
    return image.astype(jnp.float32) / 255


def masked_counts(indices: jax.Array, shape: tuple[int, ...], mask: jax.Array) -> jax.Array:
    """How often each code occurs where mask [B] is True; `shape` is [K], or [depth, K] for indices [B, ..., depth]."""
    levels = indices[..., None] if len(shape) == 1 else indices
    real = jnp.broadcast_to(mask.reshape(-1, *[1] * (levels.ndim - 2)), levels.shape[:-1])
    return jax.vmap(lambda level: code_counts(level, shape[-1], real), in_axes=-1)(levels).reshape(shape)
