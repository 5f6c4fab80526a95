"""The training step of the generator, its evaluation, and its samples for the log."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Float, Int, UInt8

from vqrae_jax import sharding
from vqrae_jax.build import generator as builder
from vqrae_jax.config import Config
from vqrae_jax.errors import ConfigError
from vqrae_jax.evaluation import visualize
from vqrae_jax.generation import autoregression, masking
from vqrae_jax.generation.network import check_sampler, generate_codes, log_likelihood
from vqrae_jax.generation.sampler_config import SamplerConfig
from vqrae_jax.inference.tokenizer import Tokenizer
from vqrae_jax.models.generator import CodeTransformer
from vqrae_jax.models.vqrae import VQRAE
from vqrae_jax.train.optim import ema_decay, learning_rate, make_optimizer, update_ema
from vqrae_jax.train.task import Batch, Metrics, TrainState
from vqrae_jax.train.tokenizer import to_float

# Fields of the generator section that the data decide; a checkpoint has them.
SAVED_FIELDS = ("tokenizer_hash", "grids", "levels", "num_embeddings", "classes", "code_channels")


class FrozenTokenizer(NamedTuple):
    """The tokenizer whose codes are generated."""

    module: VQRAE
    variables: Any  # numpy arrays
    hash: str
    code_shape: tuple[int, ...]
    image_size: int

    @classmethod
    def load(cls, path: str, encoding: str = "float32") -> "FrozenTokenizer":
        """Loads a tokenizer; `encoding` is that of the manifest of codes."""
        dtype = "bfloat16" if encoding.startswith("bfloat16") else "float32"
        tokenizer = Tokenizer.load(path, encoder_dtype=dtype)
        variables = jax.device_get(tokenizer.variables)
        return cls(tokenizer.module, variables, tokenizer.hash, tokenizer.code_shape, tokenizer.image_size)


def complete_config(config: Config, saved: dict[str, Any], tokenizer: FrozenTokenizer | None, source: Any) -> Config:
    """Returns the config with the shape of the codes and the number of classes.

    Args:
      saved: the generator section of a checkpoint of the run; empty for a new run.
      tokenizer: None for codes alone.
      source: codes or images; None if a checkpoint is evaluated without them.

    Raises:
      ConfigError: they differ from the config, or from each other.
      DataError: an image has no class.
    """
    plan = source.plan if source is not None and config.data.source == "codes" else None
    made_by = saved.get("tokenizer_hash") if plan is None else plan.tokenizer
    if tokenizer is not None and made_by not in (None, tokenizer.hash):
        message = f"is another tokenizer than that of the {'checkpoint' if plan is None else 'codes'}; pass that one"
        raise ConfigError(message, field="generator.tokenizer", value=config.generator.tokenizer)
    facts = [("the checkpoint has", {name: saved[name] for name in SAVED_FIELDS if name in saved})]
    if tokenizer is not None:
        quantizer = tokenizer.module.quantizer
        grids, levels = builder.arrange_codes(tokenizer.code_shape, quantizer.prefixes, tokenizer.module.code_grid)
        values = {"grids": grids, "levels": levels, "num_embeddings": quantizer.num_embeddings}
        values["tokenizer_hash"] = tokenizer.hash
        if config.data.source != "codes" and config.data.image_size != tokenizer.image_size:
            message = f"the tokenizer has images of {tokenizer.image_size} pixels; set data.image_size to that"
            raise ConfigError(message, field="data.image_size", value=config.data.image_size)
        if config.generator.input == "codebook":
            values["code_channels"] = _channels(tokenizer)
        facts.append(("the tokenizer has", values))
    if plan is not None:
        values = {"num_embeddings": plan.codebook_size, "tokenizer_hash": plan.tokenizer}
        values |= {"grids": plan.grids, "levels": plan.levels}
        if not plan.grids and tokenizer is None and not config.generator.grids:
            values["grids"], values["levels"] = builder.arrange_codes(plan.view_shape)
        if source.classes or config.generator.classes is None:  # without names, the labels are fewer than the classes
            values["classes"] = source.num_classes
        facts.append(("the codes have", values))
    elif source is not None and source.classes:
        facts.append(("the images have", {"classes": len(source.classes)}))
    generator, origins = config.generator, {}
    for origin, fields in facts:
        if generator.classes == 0:  # chosen: images without a class
            fields.pop("classes", None)
        generator = builder.complete(generator, origin, origins, **fields)
        origins |= {name: origin for name, value in fields.items() if value not in (None, ())}
    codes = sum(h * w for h, w in generator.grids) * (generator.levels or 1)
    if plan is not None and codes != math.prod(plan.view_shape):
        message = f"with levels={generator.levels} is not the shape of the codes, {plan.view_shape}; leave both out"
        raise ConfigError(message, field="generator.grids", value=generator.grids)
    if generator.classes is None and config.data.label_key is None:
        generator = generator.model_copy(update={"classes": 0})
    if generator.classes and source is not None:
        if plan is not None:
            source.check_labels(generator.classes)
        elif not (source.classes or config.data.label_key):
            message = "the images have no classes; use class folders or data.label_key, or set 0"
            raise ConfigError(message, field="generator.classes", value=generator.classes)
    return config.model_copy(update={"generator": generator})


@dataclasses.dataclass(frozen=True)
class GeneratorTask:
    """Trains a generator on the codes of a tokenizer: a `task.Task`."""

    config: Config
    mesh: Mesh
    module: CodeTransformer
    tokenizer: FrozenTokenizer | None = None
    classes: tuple[str, ...] | None = None  # names

    pictures = "samples"

    @classmethod
    def build(
        cls, config: Config, mesh: Mesh, tokenizer: FrozenTokenizer | None = None,
        classes: tuple[str, ...] | None = None,
    ) -> "GeneratorTask":  # fmt: skip
        """Builds the networks for a config whose generator section is complete."""
        task = cls(config, mesh, builder.build_generator(config.generator, mesh), tokenizer, classes)
        try:
            check_sampler(task.sampler, task.module.config)
        except ConfigError as error:
            raise error.renamed({error.field: f"generator.sampler.{error.field}"}) from None
        return task

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the arrays of a batch that the step reads."""
        return ("codes" if self.config.data.source == "codes" else "image", "label")

    @property
    def sampler(self) -> SamplerConfig:
        return SamplerConfig(**self.config.generator.sampler.model_dump())

    @property
    def key(self) -> jax.Array:
        return jax.random.key(self.config.train.seed)

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        settings = self.config.optimizer
        return make_optimizer(settings, functools.partial(learning_rate, settings), settings.method == "muon")

    def shapes(self) -> TrainState:
        shapes = builder.variable_shapes(self.module)
        return self._with_shardings(jax.eval_shape(self._create, shapes))

    def init(self) -> TrainState:
        vectors = None
        if self.config.generator.input == "codebook":
            tokenizer, levels = self.tokenizer, self.module.config.levels
            vectors = builder.code_vectors(tokenizer.module, tokenizer.variables, tokenizer.code_shape, levels)
        shardings = jax.tree.map(lambda x: x.sharding, self.shapes())

        def create(key: jax.Array, vectors: Any) -> TrainState:
            return self._create(builder.initial_variables(self.module, key, vectors))

        return jax.jit(create, out_shardings=shardings)(self.key, vectors)

    def _create(self, variables: dict[str, Any]) -> TrainState:
        params, ema = variables["params"], jax.tree.map(jnp.copy, variables["params"])
        step, optimizer = jnp.zeros((), jnp.int32), self.optimizer.init(params)
        return TrainState(step, params, ema, variables["batch_stats"], optimizer)

    def frozen(self) -> Any:
        """Returns the tokenizer; without its encoder if the data are codes."""
        networks = self._networks
        return jax.tree.map(sharding.place_array, networks, sharding.shardings(networks, self.mesh))

    def frozen_shapes(self) -> Any:
        return self._with_shardings(self._networks)

    @property
    def _networks(self) -> dict[str, Any]:
        if self.tokenizer is None:
            return {}
        params, stats = (self.tokenizer.variables[kind] for kind in ("params", "batch_stats"))
        if self.config.data.source == "codes":
            params = {name: tree for name, tree in params.items() if name != "encoder"}
        return {"tokenizer": {"params": params, "batch_stats": stats}}

    def step(self, state: TrainState, frozen: Any, batch: Batch, horizon: jax.Array) -> tuple[TrainState, Metrics]:
        """Takes one optimizer step; every micro-batch hides codes by itself."""
        key, optimizer = jax.random.fold_in(self.key, state.step), self.config.optimizer
        codes, parts = self._codes(frozen, batch), optimizer.accumulate
        # Part i has images i, i + parts, ... and so is on all devices.
        split = lambda x: x.reshape(len(x) // parts, parts, *x.shape[1:]).swapaxes(0, 1)  # noqa: E731
        gradients = jax.value_and_grad(self._loss, has_aux=True)

        def add(total: Any, part: Any) -> tuple[Any, Metrics]:
            (loss, metrics), grads = gradients(state.params, state.batch_stats, *part, state.step, horizon)
            return jax.tree.map(lambda t, g: t + g / parts, total, grads), {"loss/total": loss, **metrics}

        inputs = split(codes), split(batch["label"]), jax.random.split(key, parts)
        if parts == 1:
            grads, metrics = add(jax.tree.map(jnp.zeros_like, state.params), jax.tree.map(lambda x: x[0], inputs))
        else:
            grads, metrics = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, state.params), inputs)
            metrics = {name: value.mean(0) for name, value in metrics.items()}
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params, horizon=horizon)
        params = optax.apply_updates(state.params, updates)
        ema = update_ema(state.ema_params, params, ema_decay(optimizer, state.step))
        metrics["grad_norm"] = optax.tree.norm(grads)
        metrics["learning_rate"] = learning_rate(optimizer, state.step, horizon)
        return TrainState(state.step + 1, params, ema, state.batch_stats, opt_state), metrics

    def _loss(
        self, params: Any, batch_stats: Any, codes: Int[jax.Array, "B T"], label: Int[jax.Array, " B"], key: jax.Array,
        step: jax.Array, horizon: jax.Array,
    ) -> tuple[jax.Array, Metrics]:  # fmt: skip
        """Returns the loss in nats per code, and the share of the predicted codes that are the most probable ones."""
        config, architecture = self.config.generator, self.module.config
        drop_key, mask_key, dropout_key = jax.random.split(key, 3)
        dropped = jax.random.uniform(drop_key, label.shape) < config.class_dropout
        label = jnp.where(dropped | (label < 0), architecture.classes, label)
        cross_entropy = functools.partial(
            self.module.apply, builder.module_variables({"params": params, "batch_stats": batch_stats}),
            smoothing=config.smoothing, rngs={"dropout": dropout_key}, method="cross_entropy",
        )  # fmt: skip
        if architecture.blocks.causal:
            order = None
            if config.raster_steps:
                share = autoregression.anneal_randomness(step, config.permuted_steps, config.raster_steps)
                order = autoregression.permuted_orders(mask_key, (len(codes), architecture.positions), share)
            nats, correct = cross_entropy(codes, label, order=order)
            return nats.mean(), {"accuracy": correct.mean()}
        limit = math.inf if config.max_snr is None else config.max_snr
        masked = masking.mask(mask_key, codes, architecture.num_embeddings, config.schedule, limit)
        nats, correct = cross_entropy(masked.indices, label, codes)
        loss = (masking.bound if config.loss == "bound" else masking.masked_mean)(nats, masked)
        return loss, {"accuracy": masking.masked_mean(correct.astype(jnp.float32), masked)}

    def evaluate(self, variables: Any, frozen: Any, batch: Batch) -> Metrics:
        """Returns bits per code and accuracy of each image [B]; `index` is the number of each image."""
        codes, key = self._codes(frozen, batch), jax.random.fold_in(self.key, batch["index"][0])
        variables = builder.module_variables(variables)
        label = jnp.where(batch["label"] < 0, self.module.config.classes, batch["label"])
        nats, accuracy = log_likelihood(self.module, variables, key, codes, label)
        return {"bits_per_code": -nats / (codes.shape[1] * math.log(2)), "token_accuracy": accuracy}

    def log_metrics(self, state: TrainState, frozen: Any) -> Metrics:
        return {}

    def score(self, metrics: dict[str, int | float]) -> float | None:
        """Returns what decides which checkpoints are the best: fewer bits."""
        bits = metrics.get("eval/bits_per_code")
        return None if bits is None else -bits

    def sample_images(self, variables: Any, frozen: Any, batch: Batch) -> UInt8[np.ndarray, "H W 3"] | None:
        """Returns a grid of samples of evenly spaced classes; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        count, classes = self.config.train.log_images, self.module.config.classes
        labels = np.arange(count) * max(classes, 1) // count
        images = jax.device_get(self._jit_samples(variables, frozen, labels))
        names = [self.classes[i] if self.classes else f"class {i}" for i in labels] if classes else None
        return visualize.sample_grid(visualize.to_uint8(images), names)

    @functools.cached_property
    def _jit_samples(self) -> Any:
        def samples(variables: Any, frozen: Any, labels: jax.Array) -> Float[jax.Array, "B H W 3"]:
            architecture = self.module.config
            hidden = jnp.full((len(labels), architecture.length), architecture.num_embeddings)
            variables = builder.module_variables(variables)
            codes = generate_codes(self.module, variables, self.key, hidden, labels, self.sampler)
            codes = codes.reshape(-1, *self.tokenizer.code_shape)
            return self.tokenizer.module.apply(frozen["tokenizer"], codes, method="decode_from_indices")

        return jax.jit(samples, out_shardings=sharding.replicated(self.mesh))

    def _codes(self, frozen: Any, batch: Batch) -> Int[jax.Array, "B T"]:
        if "codes" in batch:
            codes = batch["codes"]
        else:
            images = to_float(batch["image"])
            codes = self.tokenizer.module.apply(frozen["tokenizer"], images, method="encode_to_indices")
        return codes.reshape(len(codes), -1)

    def _with_shardings(self, tree: Any) -> Any:
        mesh = self.config.mesh
        shardings = sharding.shardings(tree, self.mesh, mesh.fsdp, mesh.fsdp_min_size)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _channels(tokenizer: FrozenTokenizer) -> int:
    """Returns the number of channels of `builder.code_vectors`."""
    size = tokenizer.image_size
    image = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    encode = functools.partial(tokenizer.module.apply, method="encode")
    return jax.eval_shape(encode, tokenizer.variables, image).shape[-1]
