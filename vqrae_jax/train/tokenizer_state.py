"""The variables of a tokenizer in training: built from a config, initialized, and placed on a mesh."""

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from vqrae_jax import sharding
from vqrae_jax.build import judges
from vqrae_jax.build import tokenizer as builder
from vqrae_jax.config import Config, ModelConfig
from vqrae_jax.errors import ConfigError
from vqrae_jax.models.encoder import Encoder
from vqrae_jax.quantizers.factory import unread
from vqrae_jax.train import restore
from vqrae_jax.train.adversary import Adversary
from vqrae_jax.train.objective import Objective
from vqrae_jax.train.optim import make_tokenizer_optimizer
from vqrae_jax.train.task import TrainState

log = logging.getLogger(__name__)

PARTS = ("encoder", "quantizer", "decoder")


@dataclasses.dataclass(frozen=True)
class TokenizerVariables:
    """Encoder, quantizer, decoder and the networks of the loss; `Task` documents the methods.

    The parameters of a part are in the train state if it is in `config.train.trainable`, only in `ema_params` if it
    comes from `train.start_from` and does not train, and among the frozen networks otherwise.
    """

    config: Config
    mesh: Mesh
    built: builder.BuiltTokenizer
    objective: Objective
    adversary: Adversary | None = None
    start: restore.Start | None = None

    @classmethod
    def build(cls, config: Config, mesh: Mesh, weights: bool = True, start: Any = None) -> "TokenizerVariables":
        """Reads the pretrained weights, and checks that model, data and training fit together.

        Without `weights` only descriptions are read, enough for `shapes` and `frozen_shapes`. `start` is the result of
        `restore.find_start`, which is called without it.
        """
        start = start or restore.find_start(config)
        model = config.model
        if "quantizer" not in config.train.trainable:  # the codebook then does not change within a step either
            params = model.quantizer_params.model_copy(update={"frozen": True})
            model = model.model_copy(update={"quantizer_params": params})
        latents = restore.start_latents(config, start) if start else None
        built = builder.build_tokenizer(model, latent_stats=latents, weights=weights, mesh=mesh)
        _warn_unread(config.model, built.module.encoder)
        start = restore.select_start(config, start, builder.variable_shapes(built)) if start else None
        if start and start.location and "encoder" in built.pretrained:
            restore.check_start_encoder(config, start.location, built.pretrained["encoder"])
        if "encoder" not in config.train.trainable and not (start and "encoder" in start.shapes["params"]):
            built = builder.freeze_encoder(built)
        output, size, grid = built.image_size, config.data.image_size, built.module.decoder.grid
        if output != size:
            factors = f"model.decoder_patch_size={config.model.decoder_patch_size} x a latent grid of {grid}"
            patch = f"model.decoder_patch_size={size // grid} or " if size % grid == 0 else ""
            message = f"the decoder's output has {output} pixels ({factors}); set {patch}data.image_size={output}"
            raise ConfigError(message, field="data.image_size", value=size)
        perceptual, adversary = config.loss.perceptual, None
        network = judges.build_perceptual(perceptual, mesh, weights) if perceptual.weight else None
        objective = Objective(config, built.module.encoder, network)
        if config.adversary.discriminator != "none":
            network = judges.build_discriminator(config.adversary, mesh, weights, config.model.attention)
            adversary = Adversary(config.adversary, network)
        task = cls(config, mesh, built, objective, adversary, start)
        task._check_parts(weights)
        return task

    @property
    def key(self) -> jax.Array:
        return jax.random.key(self.config.train.seed)

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        return make_tokenizer_optimizer(self.config.optimizer)

    def shapes(self) -> TrainState:
        shapes = builder.variable_shapes(self.built)
        params = {n: tree for n, tree in shapes["params"].items() if n in self.config.train.trainable + self._started}
        return self._with_shardings(jax.eval_shape(self._create, params, shapes["batch_stats"], self.key))

    def init(self) -> TrainState:
        variables = self.initial_variables()
        shardings = jax.tree.map(lambda x: x.sharding, self.shapes())
        create = jax.jit(self._create, out_shardings=shardings, donate_argnums=(0, 1))
        return create(variables["params"], variables["batch_stats"], self.key)

    def initial_variables(self) -> dict[str, Any]:
        """Returns the variables of the model before training, without the frozen networks."""
        names = [n for n in self.config.train.trainable if n not in self._started]
        variables = builder.initial_variables(self.built, self.key, names, self._shardings)
        target = self.start and self._with_shardings(self.start.shapes)
        start = restore.read_start(self.config, self.start, target) if self.start else {}
        return {kind: {**tree, **start.get(kind, {})} for kind, tree in variables.items()}

    def frozen(self) -> Any:
        networks = builder.initial_params(self.built, self.key, self._frozen_parts, self._shardings)
        if self._has_teacher:
            networks["teacher"] = self._read_teacher()
        return networks | jax.tree.map(sharding.place_array, self._judges, self._shardings(self._judges))

    def frozen_shapes(self) -> Any:
        params = builder.variable_shapes(self.built)["params"]
        networks = {n: params[n] for n in self._frozen_parts if n in params}
        if self._has_teacher:
            networks["teacher"] = params["encoder"]
        return self._with_shardings(networks | self._judges)

    @property
    def _started(self) -> tuple[str, ...]:  # parts that come from train.start_from
        return tuple(self.start.shapes["params"]) if self.start else ()

    @property
    def _frozen_parts(self) -> list[str]:
        return [n for n in PARTS if n not in self.config.train.trainable + self._started]

    @property
    def _has_teacher(self) -> bool:  # the pretrained encoder, in addition to the one that trains
        loss = self.config.loss
        return bool(loss.feature_weight or loss.distill_weight) and "encoder" not in self._frozen_parts

    def _read_teacher(self) -> Any:
        started = "encoder" in self._started and "encoder" in (self.config.train.start_parts or PARTS)
        if "encoder" in self.built.pretrained or not started:
            return builder.initial_params(self.built, self.key, ["encoder"], self._shardings)["encoder"]
        target = self._with_shardings({"params": {"encoder": self.start.shapes["params"]["encoder"]}})
        return restore.read_start(self.config, self.start, target)["params"]["encoder"]  # not a random one

    @property
    def _judges(self) -> dict[str, Any]:
        discriminator = self.adversary.network if self.adversary else None
        networks = {"perceptual": self.objective.perceptual, "discriminator": discriminator}
        return {name: network.params for name, network in networks.items() if network}

    def _create(self, params: Any, batch_stats: Any, key: jax.Array) -> TrainState:
        trained = {n: tree for n, tree in params.items() if n in self.config.train.trainable}
        adversary = self.adversary.init(jax.random.fold_in(key, 1)) if self.adversary else {}
        ema, opt_state = jax.tree.map(jnp.copy, params), self.optimizer.init(trained)
        return TrainState(jnp.zeros((), jnp.int32), trained, ema, batch_stats, opt_state, adversary)

    def _check_parts(self, weights: bool) -> None:
        trainable, shapes = self.config.train.trainable, builder.variable_shapes(self.built)
        if not set(trainable) & set(shapes["params"]):
            message = f"none of these parts has parameters; choose from {', '.join(PARTS)}"
            raise ConfigError(message, field="train.trainable", value=trainable)
        learned = [n for n in ("quantizer", "decoder") if n in shapes["params"] or n in shapes["batch_stats"]]
        stats = self.start.shapes["batch_stats"] if self.start else {}
        fitted = {*trainable, *self._started, *self.built.pretrained, *stats}
        random = [n for n in learned if n not in fitted]
        if weights and random:
            message = f"{' and '.join(random)} would stay random; add it, or set train.start_from to a run that has it"
            raise ConfigError(message, field="train.trainable", value=trainable)

    def _shardings(self, tree: Any) -> Any:
        return sharding.shardings(tree, self.mesh, self.config.mesh.fsdp, self.config.mesh.fsdp_min_size)

    def _with_shardings(self, tree: Any) -> Any:
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, self._shardings(tree)
        )


def _warn_unread(model: ModelConfig, encoder: Encoder) -> None:
    for name in unread(model, encoder.channels, encoder.grid):
        section, _, field = name.rpartition(".")
        value = getattr(model.quantizer_params if section else model, field)
        log.warning("model.%s=%r has no effect with quantizer=%r", name, value, model.quantizer)
