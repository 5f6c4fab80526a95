"""The tokenizer's task: reconstruct images through a discrete code."""

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from vqrae_jax import sharding
from vqrae_jax.build import judges
from vqrae_jax.build.tokenizer import (
    BuiltTokenizer,
    build_tokenizer,
    freeze_encoder,
    initial_params,
    initial_variables,
    variable_shapes,
)
from vqrae_jax.config import Config, ModelConfig
from vqrae_jax.errors import ConfigError
from vqrae_jax.evaluation import visualize as pictures
from vqrae_jax.evaluation.psnr import psnr
from vqrae_jax.evaluation.ssim import WINDOW, ssim
from vqrae_jax.models.encoder import Encoder
from vqrae_jax.quantizers.factory import unread
from vqrae_jax.quantizers.nearest import nearest_other
from vqrae_jax.quantizers.statistics import code_counts
from vqrae_jax.train import restore
from vqrae_jax.train.adversary import Adversary
from vqrae_jax.train.objective import Objective, Painted
from vqrae_jax.train.optim import ema_decay, make_optimizer, part_rates, update_ema
from vqrae_jax.train.state import TrainState
from vqrae_jax.train.task import Metrics, is_sum

log = logging.getLogger(__name__)

PARTS = ("encoder", "quantizer", "decoder")


@dataclasses.dataclass(frozen=True)
class TokenizerTask:
    """Encoder, quantizer and decoder; what of them trains is in `config.train.trainable`."""

    config: Config
    mesh: Mesh
    built: BuiltTokenizer
    objective: Objective
    adversary: Adversary | None = None
    start: Any = None  # shapes of the model that `train.start_from` gives

    @classmethod
    def build(cls, config: Config, mesh: Mesh, weights: bool = True, own: Any = None) -> "TokenizerTask":
        """Reads the pretrained weights and checks what model, data and training ask of each other.

        With weights=False only descriptions are read: enough for `shapes` and `frozen_shapes`. `own`: shapes of the
        model in a checkpoint of this run, where there is one; what the run started from is then not looked for.
        """
        model = config.model if "quantizer" in config.train.trainable else _with_frozen_codes(config.model)
        built = build_tokenizer(model, weights=weights, mesh=mesh)
        _tell_unread(config.model, built.module.encoder)
        start = restore.start_shapes(config.train, variable_shapes(built), own) if config.train.start_from else None
        if "encoder" not in config.train.trainable and not (start and "encoder" in start["params"]):
            built = freeze_encoder(built)
        painted, given = built.image_size, config.data.image_size
        if painted != given:
            grid = built.module.decoder.grid
            fits = f"model.decoder_patch_size={given // grid} or " if given % grid == 0 else ""
            raise ConfigError(
                f"model.decoder_patch_size={config.model.decoder_patch_size} x the latent grid of {grid} paints "
                f"pictures of {painted} pixels, but data.image_size={given}: set {fits}data.image_size={painted}"
            )
        objective = Objective.build(config, built.module, mesh, weights)
        adversary = None
        if config.adversary.discriminator != "none":
            critic = judges.build_discriminator(config.adversary, mesh, weights, config.model.attention)
            adversary = Adversary(config.adversary, critic, config.train.steps)
        task = cls(config, mesh, built, objective, adversary, start)
        task._check_parts(weights)
        return task

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(self.config.optimizer, self._rates)

    @functools.cached_property
    def _rates(self) -> dict[str, optax.Schedule]:
        return part_rates(self.config.optimizer, self.config.train.steps)

    @functools.cached_property
    def _given(self) -> tuple[str, ...]:
        """Parts that train.start_from gives: in the checkpoint even where they do not train."""
        return tuple(self.start["params"]) if self.start else ()

    @property
    def codebook_size(self) -> int | None:
        return self.built.module.quantizer.num_embeddings

    def shapes(self) -> TrainState:
        shapes = variable_shapes(self.built)
        held = {n: tree for n, tree in shapes["params"].items() if n in self.config.train.trainable + self._given}
        state = jax.eval_shape(self._create, held, shapes["batch_stats"], self._key())
        return self._placed(state)

    def init(self) -> TrainState:
        where = jax.tree.map(lambda x: x.sharding, self.shapes())
        drawn = [n for n in self.config.train.trainable if n not in self._given]
        variables = initial_variables(self.built, self._key(), drawn, self._place)
        params, batch_stats = variables["params"], variables["batch_stats"]
        if self.start:
            given = restore.read_start(self.config.train, self._placed(self.start), self._place)
            params, batch_stats = {**params, **given["params"]}, {**batch_stats, **given["batch_stats"]}
        create = jax.jit(self._create, out_shardings=where, donate_argnums=(0, 1))
        return create(params, batch_stats, self._key())

    def frozen(self) -> Any:
        """Parts that neither train nor come from train.start_from, and the networks that judge."""
        networks = initial_params(self.built, self._key(), self._frozen_parts, self._place)
        if self._has_teacher:
            networks["teacher"] = initial_params(self.built, self._key(), ["encoder"], self._place)["encoder"]
        return networks | jax.tree.map(sharding.place_array, self._critics, self._place(self._critics))

    def frozen_shapes(self) -> Any:
        params = variable_shapes(self.built)["params"]
        networks = {n: params[n] for n in self._frozen_parts if n in params}
        if self._has_teacher:
            networks["teacher"] = params["encoder"]
        return self._placed(networks | self._critics)

    @property
    def _frozen_parts(self) -> list[str]:
        return [n for n in PARTS if n not in self.config.train.trainable + self._given]

    @property
    def _has_teacher(self) -> bool:
        """Whether the pretrained encoder is held beside the one that trains."""
        return self.objective.needs_teacher and "encoder" not in self._frozen_parts

    @property
    def _critics(self) -> dict[str, Any]:
        """Parameters of the networks that judge."""
        adversary = {"discriminator": self.adversary.critic.params} if self.adversary else {}
        return self.objective.frozen() | adversary

    def _create(self, held: Any, batch_stats: Any, key: jax.Array) -> TrainState:
        params = {n: tree for n, tree in held.items() if n in self.config.train.trainable}
        ema = jax.tree.map(jnp.copy, held)
        adversary = self.adversary.create(jax.random.fold_in(key, 1)) if self.adversary else {}
        return TrainState(jnp.zeros((), jnp.int32), params, ema, batch_stats, self.optimizer.init(params), adversary)

    def _check_parts(self, weights: bool) -> None:
        trainable, shapes = self.config.train.trainable, variable_shapes(self.built)
        if not set(trainable) & set(shapes["params"]):
            raise ConfigError(
                f"train.trainable={trainable}: none of these parts has parameters; choose from {', '.join(PARTS)}"
            )
        learned = [n for n in ("quantizer", "decoder") if n in shapes["params"] or n in shapes["batch_stats"]]
        known = {*trainable, *self._given, *self.built.pretrained, *(self.start or {}).get("batch_stats", {})}
        random = [n for n in learned if n not in known]
        if weights and random:
            raise ConfigError(
                f"train.trainable={trainable} leaves {' and '.join(random)} at random values: add it, or name the run "
                "that trained it in train.start_from"
            )

    def _key(self) -> jax.Array:
        return jax.random.key(self.config.train.seed)

    def _place(self, tree: Any) -> Any:
        given = self.config.mesh
        return sharding.shardings(tree, self.mesh, given.fsdp, given.fsdp_min_size)

    def _placed(self, tree: Any) -> Any:
        """Shapes with shardings."""
        where = self._place(tree)
        return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, where)

    def step(self, state: TrainState, frozen: Any, batch: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(self._key(), state.step)
        images = self._micro_batches(to_float(batch["image"]))
        grads, batch_stats, reconstructions, metrics = self._gradients(state, frozen, images, key)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = ema_decay(self.config.optimizer, state.step)
        adversary = state.adversary
        if self.adversary:
            adversary, told = self.adversary.turn(
                adversary, frozen["discriminator"], reconstructions, images, state.step, jax.random.fold_in(key, 3)
            )
            metrics |= told
        metrics["grad_norm"] = optax.tree.norm(grads)
        metrics |= {f"grad_norm/{n}": optax.tree.norm(tree) for n, tree in grads.items()}
        metrics["learning_rate"] = self._rates["decoder"](state.step)
        return TrainState(
            step=state.step + 1,
            params=params,
            ema_params=state.ema_params | update_ema({n: state.ema_params[n] for n in params}, params, decay),
            batch_stats=batch_stats,
            opt_state=opt_state,
            adversary=adversary,
        ), metrics

    def gradients(
        self, state: TrainState, frozen: Any, images: jax.Array, key: jax.Array, batch_stats: Any
    ) -> tuple[Any, Any, jax.Array, Metrics]:
        """Of one micro-batch [b, H, W, 3] in [0, 1]: gradients like state.params, the updated batch_stats, the
        reconstructions, and what to log.

        The adversarial term needs no second pass back: both losses' gradients with respect to the picture are weighed
        by what they are at the decoder's last layer, added, and pulled back once.
        """

        def paint(params: Any) -> tuple[Painted, Any]:
            variables = {"params": self._params(frozen, state, params), "batch_stats": batch_stats}
            noise, codes = jax.random.split(key)
            out, updated = self.built.module.apply(
                variables, images, train=True, method="forward", mutable=["batch_stats"],
                rngs={"noise": noise, "codes": codes},
            )  # fmt: skip
            painted = Painted(out.reconstruction, out.quantized.loss, out.encoded, out.features)
            return painted, (updated["batch_stats"], out.quantized.metrics)

        painted, pull, (updated, codes) = jax.vjp(paint, state.params, has_aux=True)
        metrics = {n if n == "counts" else f"codebook/{n}": v for n, v in codes.items()}
        terms = functools.partial(self.objective.terms, frozen=frozen, image=images, step=state.step)
        (total, values), cotangent = jax.value_and_grad(terms, has_aux=True)(painted)
        metrics |= {f"loss/{n}": v for n, v in values.items()}
        if self.adversary:

            def at_last_layer(of_picture: jax.Array) -> jax.Array:
                only = jax.tree.map(jnp.zeros_like, painted).replace(reconstruction=of_picture)
                return pull(only)[0]["decoder"]["pred"]["kernel"]  # of all that is pulled back, only this is computed

            more, gradient, told = self.adversary.term(
                state.adversary, frozen["discriminator"], painted.reconstruction, cotangent.reconstruction,
                at_last_layer, state.step, jax.random.fold_in(key, 2),
            )  # fmt: skip
            total, metrics = total + more, metrics | told
            cotangent = cotangent.replace(reconstruction=cotangent.reconstruction + gradient)
        metrics["loss/total"] = total
        (grads,) = pull(cotangent)
        if "quantizer" not in self.config.train.trainable and "quantizer" in updated:
            updated = {**updated, "quantizer": batch_stats["quantizer"]}
        return grads, updated, jax.lax.stop_gradient(painted.reconstruction), metrics

    def _params(self, frozen: Any, state: TrainState, params: Any) -> Any:
        parts = {n: frozen[n] for n in PARTS if n in frozen}
        return {**parts, **{n: tree for n, tree in state.ema_params.items() if n not in params}, **params}

    def _micro_batches(self, images: jax.Array) -> jax.Array:
        """[B, ...] -> [parts, B / parts, ...]; part i takes images i, i + parts, ...: so each stays spread over all
        devices."""
        parts = self.config.optimizer.accumulate
        return images.reshape(len(images) // parts, parts, *images.shape[1:]).swapaxes(0, 1)

    def _gradients(
        self, state: TrainState, frozen: Any, images: jax.Array, key: jax.Array
    ) -> tuple[Any, Any, jax.Array, Metrics]:
        """Mean gradients over the micro-batches; the codebook is updated after each of them."""
        if len(images) == 1:
            grads, batch_stats, reconstruction, metrics = self.gradients(
                state, frozen, images[0], key, state.batch_stats
            )
            return grads, batch_stats, reconstruction[None], metrics

        def add(carry: tuple[Any, Any], part: tuple[jax.Array, jax.Array]) -> tuple[tuple[Any, Any], Any]:
            total, batch_stats = carry
            grads, batch_stats, reconstruction, metrics = self.gradients(state, frozen, *part, batch_stats)
            total = jax.tree.map(lambda t, g: t + g / len(images), total, grads)
            # Kept for the discriminator only.
            return (total, batch_stats), (reconstruction if self.adversary else None, metrics)

        start = (jax.tree.map(jnp.zeros_like, state.params), state.batch_stats)
        keys = jax.random.split(key, len(images))
        (grads, batch_stats), (reconstructions, stacked) = jax.lax.scan(add, start, (images, keys))
        metrics = {n: v.sum(0) if is_sum(v) else v.mean(0) for n, v in stacked.items()}
        return grads, batch_stats, reconstructions, metrics

    def evaluate_batch(self, variables: Any, frozen: Any, batch: dict[str, jax.Array]) -> Metrics:
        images = to_float(batch["image"])
        out = self._forward(variables, frozen, images)
        z = out.quantized.z
        seen = {
            "reconstruction": out.reconstruction,
            "code": z.reshape(len(z), -1, z.shape[-1]).astype(jnp.float32).mean(1),
            "psnr": psnr(out.reconstruction, images),
        }
        if min(images.shape[1:3]) >= WINDOW:
            seen["ssim"] = ssim(out.reconstruction, images)
        if "counts" in out.quantized.metrics:
            shape = out.quantized.metrics["counts"].shape
            seen["counts"] = masked_counts(out.quantized.indices, shape, batch["mask"])
        return seen

    def codebook(self, state: TrainState, frozen: Any) -> Metrics:
        params = self._params(frozen, state, state.params)
        variables = {"params": params, "batch_stats": state.batch_stats}
        codes = self.built.module.apply(variables, method=lambda model: model.quantizer.embeddings())
        return {} if codes is None or len(codes) < 2 else {"codebook/distance": nearest_other(codes).mean()}

    def pictures(self, variables: Any, frozen: Any, batch: dict[str, jax.Array]) -> Any:
        images = batch["image"][: self.config.train.log_images]
        out = self._forward(variables, frozen, to_float(images))
        return images, out.reconstruction, out.quantized.indices

    def draw(self, arrays: Any) -> np.ndarray:
        images, reconstructions, indices = arrays
        return pictures.reconstruction_grid(
            images, pictures.to_uint8(reconstructions), indices, self.built.module.encoder.grid
        )

    def _forward(self, variables: Any, frozen: Any, images: jax.Array) -> Any:
        parts = {n: frozen[n] for n in PARTS if n in frozen}
        variables = {**variables, "params": {**parts, **variables["params"]}}
        return self.built.module.apply(variables, images, method="forward")


def _with_frozen_codes(model: ModelConfig) -> ModelConfig:
    """The same model, whose codes do not move within a step either, from one scale or level to the next."""
    return model.model_copy(update={"quantizer_params": model.quantizer_params.model_copy(update={"frozen": True})})


def _tell_unread(model: ModelConfig, encoder: Encoder) -> None:
    for name in unread(model, encoder.channels, encoder.grid):
        section, _, field = name.rpartition(".")
        value = getattr(model.quantizer_params if section else model, field)
        log.warning("model.%s=%r: quantizer=%r does not read it", name, value, model.quantizer)


def to_float(image: jax.Array) -> jax.Array:
    """uint8 -> [0, 1]; on the device, because bytes are four times cheaper to send."""
    return image.astype(jnp.float32) / 255


def masked_counts(indices: jax.Array, shape: tuple[int, ...], mask: jax.Array) -> jax.Array:
    """How often each code occurs where mask [B] is True; `shape` is [K], or [depth, K] for indices [B, ..., depth]."""
    levels = indices[..., None] if len(shape) == 1 else indices
    real = jnp.broadcast_to(mask.reshape(-1, *[1] * (levels.ndim - 2)), levels.shape[:-1])
    return jax.vmap(lambda level: code_counts(level, shape[-1], real), in_axes=-1)(levels).reshape(shape)
