"""The law of the config: every field changes what it should change, and nothing else that is observed with it.

`LAW` has an entry for every field, and `SETTINGS` one for every setting of a quantizer: another value than the base
config's, and the observations that it changes. Programs are traced and not compiled.
"""

import contextlib
import functools
import hashlib
import pathlib
import re
import sys
import tarfile
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from unittest.mock import Mock

import flax.linen as nn
import grain
import jax
import numpy as np
import optax
import pytest
from jax.interpreters import partial_eval

from vqrae_jax import checkpoint, sharding
from vqrae_jax.build import generator as generators
from vqrae_jax.build import judges
from vqrae_jax.build import tokenizer as builder
from vqrae_jax.checkpoint import Checkpoints
from vqrae_jax.config import Config, Section, epochs_to_steps, from_dict
from vqrae_jax.data import codes, pipeline
from vqrae_jax.data.code_shards import Columns
from vqrae_jax.data.code_source import CodeSource
from vqrae_jax.data.folder import Folder
from vqrae_jax.data.images import write_image
from vqrae_jax.errors import ConfigError
from vqrae_jax.models import decoder, vit
from vqrae_jax.pretrained import judge_weights
from vqrae_jax.quantizers import factory
from vqrae_jax.quantizers.registry import QUANTIZERS, WRAPPERS, all_settings, settings_of
from vqrae_jax.train import hooks, loop, optim, sample_evaluation
from vqrae_jax.train import run as opening
from vqrae_jax.train.adversary import Adversary
from vqrae_jax.train.generator import FrozenTokenizer, GeneratorTask
from vqrae_jax.train.task import Task, TrainState
from vqrae_jax.train.tokenizer import TokenizerTask

GOLDEN = pathlib.Path(__file__).parent / "golden"
ENCODERS = {name: str(GOLDEN / "encoders" / name) for name in ("dinov2_with_registers", "dinov2_swiglu", "vit_mae")}
ARCHITECTURE = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 32,
}  # fmt: skip
BASE = {
    "model.encoder_config_path": None, "model.encoder_params.architecture": ARCHITECTURE,
    "model.encoder_input_size": 32, "model.decoder_config_path": str(GOLDEN / "vqrae" / "decoder_config"),
    "model.decoder_patch_size": 8, "model.num_embeddings": 16, "model.quantizer": "none",
    "data.path": "images/a", "data.eval_path": "images/a", "data.image_size": 32, "data.batch_size": 8,
    "data.eval_batch_size": 16, "train.trainable": ("encoder", "decoder"), "train.steps": 6,
}  # fmt: skip
IMAGES = 80  # of an epoch, for fields in epochs


def build(fields: dict[str, Any]) -> Config:
    """Returns the base config with other values of some fields, by path."""
    values = Config().model_dump()
    for path, value in (BASE | fields).items():
        *sections, name = path.split(".")
        functools.reduce(dict.__getitem__, sections, values)[name] = value
    return from_dict(Config, values)


def program(function: Callable, *arguments: Any) -> str:
    """Returns a digest of the operations that the results of a function of arrays or shapes depend on."""
    closed = jax.make_jaxpr(function)(*arguments)
    live, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    digest = hashlib.sha256(re.sub("0x[0-9a-f]+", "", str(live)).encode())
    for constant in closed.consts:
        digest.update(np.asarray(constant).tobytes())
    return digest.hexdigest()


def shapes(tree: Any) -> Any:
    return {jax.tree_util.keystr(path): (x.shape, x.dtype) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def array(shape: tuple[int, ...], dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


# --- Observations: functions of a config that return what can change, by name. ---


# Shapes without blocks are kept apart from those of whole networks.
small_shapes = functools.cache(builder._shapes_of_module.__wrapped__)


@contextlib.contextmanager
def small_networks():
    """Leaves out the blocks of transformers, which take most of the time of a trace."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (vit, decoder):
            patch.setattr(module, "run_blocks", lambda cfg, x, rope=None, taps=(): (x, [x] * len(taps)))
        patch.setattr(builder, "_shapes_of_module", small_shapes)
        yield patch


class Linear(nn.Module):
    """A discriminator."""

    @nn.compact
    def __call__(self, image, train=False):
        return nn.Dense(2)(image.reshape(len(image), -1))


@contextlib.contextmanager
def small_task(config: Config):
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.model)
    with small_networks() as patch:
        patch.setattr(judges, "build_discriminator", lambda *_: judges.FrozenNetwork(Linear(), {}))
        task = TokenizerTask.build(epochs_to_steps(config, lambda: IMAGES), mesh, weights=False)
        yield task, task.shapes(), array((8, *[task.built.image_size] * 2, 3), np.uint8)


def step(config: Config) -> dict[str, Any]:
    """The training step, and how its state is split."""
    with small_task(config) as (task, state, image):
        return {
            "step": program(task.step, state, task.frozen_shapes(), {"image": image}, array((), np.int32)),
            "shardings": [str(x.sharding.spec) for x in jax.tree.leaves(state)],
        }


def samples(config: Config) -> dict[str, Any]:
    with small_task(config) as (task, state, image):
        return {"samples": jax.eval_shape(task._jit_samples, state.inference(), {}, image)}


def blocks(config: Config) -> dict[str, Any]:
    """The variables of the model, its forward pass in training, and its latents."""
    with pytest.MonkeyPatch.context() as patch:  # NVIDIA's kernel cannot be traced without a GPU
        patch.setattr(jax, "default_backend", lambda: "gpu")
        patch.setattr(jax.nn, "dot_product_attention", lambda query, *_, **__: query)
        built = builder.build_tokenizer(config.model, weights=False)
        variables = builder.variable_shapes(built)

        def forward(variables, image, key):
            options = {"mutable": ["batch_stats"], "rngs": {"noise": key, "codes": key}}
            return built.module.apply(variables, image, True, method="forward", **options)

        arguments = variables, array((2, built.image_size, built.image_size, 3)), jax.random.key(0)
        latents = jax.eval_shape(forward, *arguments)[0].latent
        return {"model": (shapes(variables), program(forward, *arguments)), "latents": latents}


def model(config: Config) -> dict[str, Any]:
    with small_networks():
        return blocks(config)


def parts(config: Config) -> dict[str, Any]:
    module = builder.build_tokenizer(config.model, weights=False).module
    return {"encoder": repr(module.encoder), "decoder": repr(module.decoder)}


def weights(config: Config) -> dict[str, Any]:
    """What the model starts from: the arrays of files."""
    built = builder.build_tokenizer(config.model)
    trees = {"pretrained": built.pretrained, "statistics": built.latent_stats, "whitening": built.whitening}
    return {name: {p: x.tobytes() for p, x in flatten(tree).items()} for name, tree in trees.items()}


def flatten(tree: Any) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def layer(config: Config) -> dict[str, Any]:
    """A quantizer by itself in training, with the gradient of its latents, and its variables."""
    quantizer = factory.create(config.model, 6, 4)
    z, key = array((8, 4, 4, 6)), jax.random.key(0)
    variables = jax.eval_shape(quantizer.init, key, z)

    def train(z, variables, key):
        out, state = quantizer.apply(variables, z, True, mutable=["batch_stats"], rngs={"codes": key})
        return out.loss + out.z.sum(), (out, state)

    return {"layer": (shapes(variables), program(jax.grad(train, has_aux=True), z, variables, key))}


def discriminator(config: Config) -> dict[str, Any]:
    """The network of the discriminator; the files of DINO are two networks of zeros."""

    def read(name, field):
        depth, width = {"small": (2, 128), "large": (3, 128)}[name]
        tensors = {"patch_embed.proj.weight": (width, 3, 8, 8), "pos_embed": (1, 17, width)}
        tensors |= {f"blocks.{i}.mlp.fc1.weight": (8, width) for i in range(depth)}
        return {name: np.zeros(shape, np.float32) for name, shape in tensors.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge_weights.sources, "read_state_dict", read)
        module = judges.build_discriminator(config.adversary, weights=False).module
        return {"discriminator": program(module.init_with_output, jax.random.key(0), array((1, 32, 32, 3)))}


def tokenizer_update(config: Config) -> dict[str, Any]:
    config = epochs_to_steps(config, lambda: IMAGES).optimizer
    return optimizer_update(optim.make_tokenizer_optimizer(config))


def discriminator_update(config: Config) -> dict[str, Any]:
    config = epochs_to_steps(config, lambda: IMAGES).adversary
    return optimizer_update(Adversary(config, judges.FrozenNetwork(Linear(), {})).optimizer)


def optimizer_update(optimizer: optax.GradientTransformationExtraArgs) -> dict[str, Any]:
    """An optimizer by itself, with its schedule."""
    params = {"decoder": {"blocks": {"up": {"kernel": array((1, 2, 2))}}}}
    state = jax.eval_shape(optimizer.init, params)

    def update(grads, state, params, horizon):
        return optimizer.update(grads, state, params, horizon=horizon)

    return {"update": program(update, params, state, params, array((), np.int32))}


def files(config: Config) -> dict[str, Any]:
    """The files that are read for judges of images."""
    names = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge_weights.sources, "read_state_dict", lambda name, field: names.append(name))
        patch.setattr(judge_weights, "convert", lambda state, table, target, source: target)
        patch.setattr(judges.writers, "content_hash", lambda params: "")
        patch.setattr(judges, "_param_shapes", lambda *_: {"trunk": {}})
        judges.build_perceptual(config.loss.perceptual)
        judges.load_metric_networks(config.evaluation, ("inception",))
        return {"files": names}


def perceptual(config: Config) -> dict[str, Any]:
    with small_networks() as patch:
        patch.setattr(judges, "_param_shapes", lambda *_: {})
        return {"module": repr(judges.build_perceptual(config.loss.perceptual, weights=False).module)}


def metric_network(config: Config) -> dict[str, Any]:
    networks = judges.load_metric_networks(config.evaluation, ("encoder",))
    return {
        "features": (
            networks.protocol["encoder"]["sha256"],
            program(networks.features, networks.params, array((1, 32, 32, 3))),
        )
    }


STATE = TrainState(0, {}, {}, {}, {})


class Darker(Task):
    """A task without a model: reconstructions are darker images."""

    inputs, pictures = ("image",), "reconstructions"
    shapes = frozen = init = staticmethod(lambda: STATE)
    initial_variables = staticmethod(lambda: {"params": {}, "batch_stats": {}})

    def evaluate(self, variables, frozen, batch):
        image = batch["image"] / 255
        return {"reconstruction": 0.9 * image, "psnr": image.mean((1, 2, 3)), "code": image.mean((1, 2))}


class Mean(nn.Module):
    """A metric network: the mean color, with class scores and spatial features of Inception."""

    with_scores: bool

    def __call__(self, image):
        mean = image.mean((1, 2))
        return (mean, mean, mean) if self.with_scores else mean


@contextlib.contextmanager
def opened(config: Config, **options: Any):
    """Opens a run with stand-ins for model, networks and checkpoints; yields it, and what they were called with."""
    calls = {"metrics": None, "prepared": [], "threads": [], "workers": 0}

    def load(evaluation, metrics, perceptual):
        calls["metrics"] = metrics
        modules = {name: Mean(name == "inception") for name in judges.FEATURES if name in metrics}
        return judges.MetricNetworks(modules, {name: {} for name in modules}, {})

    def policies(workdir, keep_last, keep_best, keep_every, **_):
        calls.update(keep_last=keep_last, keep_best=keep_best, keep_every=keep_every)
        return Mock(Checkpoints, steps=[])

    def prepared(*arguments, keys=None):
        calls["prepared"].append((*arguments, keys))
        return Folder("images/a")

    def read_options(num_threads, **rest):
        calls["threads"].append(num_threads)
        return original(num_threads=num_threads, **rest)

    original = grain.ReadOptions
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening.TokenizerTask, "build", lambda *_, **__: Darker())
        patch.setattr(opening, "_build_generator", lambda config, *_: (config, Mock(GeneratorTask, inputs=())))
        patch.setattr(opening, "Checkpoints", policies)
        patch.setattr(opening.restore, "resume", lambda *_: None)
        patch.setattr(judges, "load_metric_networks", load)
        patch.setattr(opening.weights, "fetch_all", lambda weights: [])
        patch.setattr(pipeline, "Prepared", prepared)
        patch.setattr(grain, "ReadOptions", read_options)
        patch.setattr(
            grain.IterDataset, "mp_prefetch", lambda data, o, **_: calls.update(workers=o.num_workers) or data
        )
        with opening.open_run(config, "run", **options) as (run, _):
            yield run, calls


def run(config: Config) -> dict[str, Any]:
    """What a run opens: batches, validation images, the mesh, and how they are read."""
    with opened(config) as (run, calls):
        calls["threads"] = []
        batches = [next(run.batches)["image"].tobytes() for _ in range(2)]
        training, calls["threads"] = calls["threads"], []
        return {
            "batches": batches,
            "validation": [(b["image"].tobytes(), b["mask"].tobytes()) for b in run.evaluator._batches],
            "references": run.evaluator.listings().keys() - {"data.eval_path"},
            "mesh": dict(run.mesh.shape),
            "training_threads": training,
            **calls,
        }


def sequences(config: Config) -> dict[str, Any]:
    """Batches of codes, or of images."""

    def content(batch):
        return [(name, array.tobytes()) for name, array in batch.items()]

    training = pipeline.train_batches(config.data, seed=config.train.seed)
    validation = pipeline.evaluation_batches(config.data)
    return {"batches": [content(next(training)) for _ in range(2)], "validation": list(map(content, validation))}


def measured(config: Config) -> dict[str, Any]:
    """The metrics of --mode=evaluate."""
    with opened(config, evaluate_step=0) as (_, calls):
        return {"metrics": calls["metrics"]}


def evaluated(config: Config) -> dict[str, Any]:
    with opened(config, devices=jax.devices()[:1], evaluate_step=0) as (run, _):
        result = run.evaluator.evaluate({}, {})
        examples = run.evaluator.examples(result, {}, {})
        return {"kernel": result.metrics["eval/encoder_kernel"], "examples": {n: len(x) for n, x in examples.items()}}


def events(config: Config) -> dict[str, Any]:
    """What the training loop does after which steps, and what its hooks are built with."""
    seen = {"logged": [], "evaluated": [], "saved": []}
    batches = iter([{"image": np.zeros((8, 1, 1, 3), np.uint8)}] * 100)
    config = epochs_to_steps(config, lambda: IMAGES)
    mesh = sharding.make_mesh()
    checkpoints = Mock(Checkpoints)
    opened = Mock(opening.Run, config=config, workdir=pathlib.Path("run"), mesh=mesh, task=Darker(), frozen={})
    opened.configure_mock(batches=batches, checkpoints=checkpoints, evaluator=None, skipped=Mock())
    timer = Mock(hooks.StepTimer, timed=lambda batches: batches)
    timer.after_step = lambda event: event.log and seen["logged"].append(event.step)

    def dispatch(state, frozen, batch, horizon):
        seen["horizon"] = int(horizon)
        return state.replace(step=state.step + 1), {}

    writers = Mock(loop.MetricWriters, tensorboard=pathlib.Path("run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "open_run", lambda *_: contextlib.nullcontext((opened, STATE)))
        patch.setattr(loop, "jit_step", lambda task, mesh: dispatch)
        patch.setattr(loop, "MetricWriters", lambda w, c, project, first: seen.update(wandb=project) or writers)
        patch.setattr(loop, "_evaluate_and_log", lambda run, state, step, *_: seen["evaluated"].append(step) or {})
        patch.setattr(loop, "save_checkpoint", lambda run, state, metrics: seen["saved"].append(state.step))
        patch.setattr(loop, "_print_summary", lambda *_: None)
        patch.setattr(hooks, "StepTimer", lambda size, alarm: seen.update(images=size, alarm=alarm) or timer)
        patch.setattr(hooks, "Watchdog", lambda seconds: seen.update(hang=seconds) or hooks.Hook())
        for name in ("NaNGuard", "Heartbeat", "StepLog", "Logger", "Profiler"):
            patch.setattr(hooks, name, lambda *_: Mock(hooks.Hook, show=None, first_step_seconds=None))
        loop.train(config, "run")
    return seen


def start(config: Config) -> dict[str, Any]:
    """What a run takes from the checkpoint of another one; "renamed" has its decoder under another name."""
    with small_networks() as patch:
        saved = TokenizerTask.build(build({}), sharding.make_mesh(), weights=False).shapes().inference()
        params = {"old" if name == "decoder" else name: tree for name, tree in saved["params"].items()}
        checkpoints = {"whole": saved, "renamed": {**saved, "params": params}}
        patch.setattr(checkpoint, "find_checkpoint", lambda path, _: pathlib.Path(path))
        patch.setattr(checkpoint, "read_meta", lambda path: {"config": build({}).model_dump(mode="json")})
        patch.setattr(checkpoint, "saved_shapes", lambda path: checkpoints[path.name])
        task = TokenizerTask.build(config, sharding.make_mesh(), weights=False)
        return {"start": task.start and sorted(shapes(task.start.shapes))}


def seeded(config: Config) -> dict[str, Any]:
    return {"step": step(config)["step"], "batches": run(config)["batches"]}


def architecture(config: Config) -> dict[str, Any]:
    return {"module": repr(generators.build_generator(config.generator))}


def generator_loss(config: Config) -> dict[str, Any]:
    """The loss of a generator without blocks, and its inputs."""
    config = epochs_to_steps(config, lambda: IMAGES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vit, "run_blocks", lambda cfg, x, *_, **__: (x, []))
        task = GeneratorTask.build(config, sharding.make_mesh(devices=jax.devices()[:1]))
        state, scalar = task.shapes(), array((), np.int32)
        arrays = array((8, 8), np.int32), array((8,), np.int32)
        loss = program(task._loss, state.params, state.batch_stats, *arrays, task.key, scalar, scalar)
        return {"loss": loss, "inputs": task.inputs}


def generator_update(config: Config) -> dict[str, Any]:
    task = GeneratorTask(config, sharding.make_mesh(), generators.build_generator(config.generator))
    return optimizer_update(task.optimizer)


def sampled(config: Config) -> dict[str, Any]:
    """The samplers of a generator's pictures and of its evaluation."""
    task = GeneratorTask.build(config, sharding.make_mesh())
    return {"pictures": task.sampler, "evaluation": sample_evaluation.samplers(config)}


def sample_count(config: Config) -> dict[str, Any]:
    """The number of samples that are compared with a reference."""
    generator = Mock(sample_evaluation.Generator, tokenizer=Mock(image_size=32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_evaluation.Generator, "load", lambda *_, **__: generator)
        kind = sample_evaluation.SampleEvaluator
        patch.setattr(kind, "__init__", lambda evaluator, *arguments: setattr(evaluator, "arguments", arguments))
        names = sample_evaluation.sample_metrics(config)
        return {"count": sample_evaluation._load(config, "run", 0, None, names, None)[1].arguments[-1]}


def completed(config: Config) -> dict[str, Any]:
    """The shape of the codes of a run, and the tokenizer that it reads."""
    names = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrozenTokenizer, "load", lambda name, encoding: names.append(name))
        patch.setattr(opening.GeneratorTask, "build", lambda *_: Mock(GeneratorTask))
        source = CodeSource(config.data.path)
        config, _ = opening._build_generator(config, sharding.make_mesh(), pathlib.Path("run"), None, source)
        return {"tokenizers": names, "hash": config.generator.tokenizer_hash}


def task_kind(config: Config) -> dict[str, Any]:
    """Which task a run opens."""
    with opened(config) as (run, _):
        return {"task": type(run.task)}


def error_of(observe: Callable[[Config], dict[str, Any]]) -> Callable[[Config], dict[str, Any]]:
    """For fields that are checks: observes the field of the ConfigError, or None."""

    def error(config: Config) -> dict[str, Any]:
        try:
            observe(config)
        except ConfigError as reason:
            return {"error": reason.field}
        return {"error": None}

    return error


def without_wandb(config: Config) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)
        return run(config)


class Entry(NamedTuple):
    """Another value of a field, the observation, the names in it that change, and fields that it is read with.

    A field that is read in two places has two entries, the second with one more word in its name.
    """

    value: Any
    observe: Callable[[Config], dict[str, Any]]
    changes: str
    fields: Mapping[str, Any] = types.MappingProxyType({})


def steps(value: Any, fields: Mapping[str, Any] = types.MappingProxyType({})) -> Entry:
    return Entry(value, step, "step", fields)


PRETRAINED = {
    "model.encoder_config_path": ENCODERS["dinov2_with_registers"], "model.encoder_params.architecture": {},
    "model.encoder_input_size": 56, "data.image_size": 32,
}  # fmt: skip
CODES = {"model.quantizer": "ema", "train.trainable": ("encoder", "quantizer", "decoder")}
PERCEPTUAL = {
    "loss.perceptual.network": "encoder", "loss.perceptual.weight": 1.0, "loss.perceptual.input_size": 32,
    "loss.perceptual.architecture": ARCHITECTURE,
}  # fmt: skip
DECODER = {
    "decoder_hidden_size": 16, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}  # fmt: skip
FEATURES = {"model.decoder_features": (0,), "loss.feature_weight": 1.0}
PATCH = {
    "adversary.discriminator": "patch", "adversary.width": 4, "adversary.layers": 1, "adversary.spectral": False,
    "adversary.adaptive": False, "adversary.augment": 0.0,
}  # fmt: skip
DINO = {"adversary.discriminator": "dino", "adversary.path": "small", "adversary.taps": (0,), "adversary.window": 3}
METRIC = {
    "evaluation.encoder_path": ENCODERS["dinov2_with_registers"], "evaluation.encoder_input_size": 28,
    "evaluation.inception_path": "x",
}  # fmt: skip
TOKENIZED = {
    "data.source": "codes", "train.task": "generator", "generator.grids": ((2, 4),), "generator.levels": 1,
    "generator.num_embeddings": 16, "generator.classes": 2, "generator.width": 16, "generator.depth": 1,
    "generator.heads": 2, "generator.mlp": 8,
}  # fmt: skip
GENERATED = {**TOKENIZED, "data.source": "folder", "generator.tokenizer": "x"}
CAUSAL = {**TOKENIZED, "generator.family": "autoregressive"}
PERMUTED = {**CAUSAL, "generator.permuted_steps": 1, "generator.raster_steps": 2}
BOUND = {**TOKENIZED, "generator.loss": "bound"}
MEASURED = {"evaluation.metrics": ("encoder",)}
NETWORKS = {"evaluation.training_metrics": ("encoder", "inception")}


def optimizer(section: str, observe: Callable[[Config], dict[str, Any]]) -> dict[str, Entry]:
    """Returns the entries of the fields of an AdamWConfig."""
    values = {
        "learning_rate": 1e-3, "final_learning_rate": 1e-6, "reference_batch": 4, "schedule": "linear",
        "warmup_steps": 3, "warmup_epochs": 0.5, "decay_end_steps": 3, "decay_end_epochs": 0.5, "b1": 0.8, "b2": 0.9,
        "weight_decay": 0.1, "clip_norm": 1.0,
    }  # fmt: skip
    return {f"{section}.{name}": Entry(value, observe, "update") for name, value in values.items()}


LAW: dict[str, Entry] = {
    "model.encoder_cls": Entry("MAEwNorm", model, "model"),
    "model.encoder_config_path": Entry(ENCODERS["dinov2_swiglu"], weights, "pretrained", PRETRAINED),
    "model.encoder_params.normalize": Entry(False, model, "model"),
    "model.encoder_params.layers": Entry((0,), blocks, "model"),
    "model.encoder_params.fusion": Entry("sum", model, "model", {"model.encoder_params.layers": (0, 1)}),
    "model.encoder_params.fusion learned": Entry("linear", model, "model", {"model.encoder_params.layers": (0, 1)}),
    "model.encoder_params.architecture": Entry(ARCHITECTURE | {"num_hidden_layers": 1}, blocks, "model"),
    "model.encoder_params.dinov2_path": Entry(ENCODERS["dinov2_swiglu"], weights, "pretrained", PRETRAINED),
    "model.encoder_params.dinov3_path": Entry(ENCODERS["dinov2_swiglu"], weights, "pretrained", PRETRAINED),
    "model.encoder_params.model_name": Entry(ENCODERS["dinov2_swiglu"], weights, "pretrained", PRETRAINED),
    "model.encoder_input_size": Entry(16, model, "model latents"),
    "model.decoder_config_path": Entry("ViT-S", model, "model"),
    "model.decoder_architecture": Entry(
        DECODER | {"decoder_hidden_size": 8},
        model,
        "model",
        {"model.decoder_config_path": None, "model.decoder_architecture": DECODER},
    ),
    "model.decoder_patch_size": Entry(16, model, "model"),
    "model.decoder_head": Entry("overlap", model, "model"),
    "model.decoder_train_pos_embed": steps(True),
    "model.pretrained_decoder_path": Entry(
        str(GOLDEN / "vqrae" / "ema_vq_2d" / "model.npz"),
        weights,
        "pretrained",
        {**PRETRAINED, "model.decoder_patch_size": 16},
    ),
    "model.decoder_features": Entry((0,), model, "model"),
    "model.decoder_feature_blocks": Entry(1, model, "model", {"model.decoder_features": (0,)}),
    "model.resampler_tokens": Entry(8, model, "model latents"),
    "model.resampler_blocks": Entry(1, model, "model", {"model.resampler_tokens": 8}),
    "model.resampler_nested": Entry(True, model, "model", {"model.resampler_tokens": 8, "model.quantizer": "ema"}),
    "model.decoder_grid": Entry(3, model, "model", {"model.resampler_tokens": 8}),
    "model.noise_tau": Entry(0.5, model, "model"),
    "model.reshape_to_2d": Entry(False, model, "model latents"),
    "model.normalization_stat_path": Entry(
        "statistics.npz",
        weights,
        "statistics whitening",
        {"model.quantizer": "ema", "model.quantizer_params.whitening_dim": 2},
    ),
    "model.quantizer": Entry("lfq", model, "model"),
    "model.quantize_before_reshape": Entry(True, model, "model", CODES),
    "model.dtype": Entry("bfloat16", model, "model latents"),
    "model.attention": Entry("cudnn", blocks, "model", {"model.dtype": "bfloat16"}),
    "model.dtype parts": Entry("bfloat16", parts, "encoder decoder"),
    "model.attention parts": Entry("cudnn", parts, "encoder decoder", {"model.dtype": "bfloat16"}),
    "model.remat": Entry(True, blocks, "model"),
    "data.source": Entry("webdataset", run, "batches validation"),
    "data.source codes": Entry("codes", sequences, "batches validation", GENERATED),
    "data.source generator": Entry("codes", generator_loss, "inputs", GENERATED),
    "data.path": Entry("images/b", run, "batches"),
    "data.path codes": Entry("images/b", sequences, "batches", TOKENIZED),
    "data.eval_path": Entry("images/b", run, "validation"),
    "data.eval_path codes": Entry("images/b", sequences, "validation", TOKENIZED),
    "data.name": Entry("photos", run, "prepared", {"data.source": "tfds"}),
    "data.image_key": Entry("photo", run, "prepared", {"data.source": "tfds"}),
    "data.label_key": Entry("fine", run, "prepared", {"data.source": "tfds"}),
    "data.train_split": Entry("train[:50%]", run, "prepared", {"data.source": "tfds"}),
    "data.eval_split": Entry("test", run, "prepared", {"data.source": "tfds"}),
    "data.image_size": Entry(24, run, "batches validation"),
    "data.crop": Entry("center", run, "batches"),
    "data.crop adm": Entry("adm", run, "batches", {"data.crop": "center"}),
    "data.eval_crop": Entry("adm", run, "validation"),
    "data.resize": Entry(1.5, run, "batches"),
    "data.scale": Entry((0.5, 1.0), run, "batches"),
    "data.flip": Entry(False, run, "batches"),
    "data.max_pixels": Entry(6000, run, "batches validation"),
    "data.batch_size": Entry(16, run, "batches"),
    "data.batch_size codes": Entry(16, sequences, "batches", TOKENIZED),
    "data.eval_batch_size": Entry(8, run, "validation"),
    "data.eval_batch_size codes": Entry(8, sequences, "validation", TOKENIZED),
    "data.workers": Entry(2, run, "workers", {"data.workers": 1}),
    "data.threads": Entry(2, run, "training_threads threads"),
    "loss.pixel": steps("l2"),
    "loss.pixel_weight": steps(2.0),
    "loss.gradient_weight": steps(1.0),
    "loss.vq_weight": steps(2.0),
    "loss.perceptual.network": Entry("lpips", perceptual, "module", PERCEPTUAL),
    "loss.perceptual.weight": steps(2.0, PERCEPTUAL),
    "loss.perceptual.gram_weight": steps(1.0, PERCEPTUAL),
    "loss.perceptual.start_steps": steps(2, PERCEPTUAL),
    "loss.perceptual.start_epochs": steps(0.5, PERCEPTUAL),
    "loss.perceptual.trunk": Entry("another", files, "files", METRIC),
    "loss.perceptual.heads": Entry("another", files, "files", METRIC),
    "loss.perceptual.path": steps(
        ENCODERS["dinov2_with_registers"],
        {
            **PERCEPTUAL,
            "loss.perceptual.input_size": 28,
            "loss.perceptual.path": ENCODERS["dinov2_swiglu"],
            "loss.perceptual.architecture": {},
        },
    ),
    "loss.perceptual.encoder_cls": steps("MAEwNorm", PERCEPTUAL),
    "loss.perceptual.architecture": steps(ARCHITECTURE | {"hidden_size": 8}, PERCEPTUAL),
    "loss.perceptual.layers": steps((0, 1), PERCEPTUAL),
    "loss.perceptual.input_size": steps(16, PERCEPTUAL),
    "loss.perceptual.dtype": steps("bfloat16", PERCEPTUAL),
    "loss.perceptual.dtype lpips": Entry("bfloat16", perceptual, "module"),
    "loss.feature_weight": steps(2.0, FEATURES),
    "loss.feature_distance": steps("l2", FEATURES),
    "loss.distill_weight": steps(1.0),
    "loss.distill_distance": steps("cosine", {"loss.distill_weight": 1.0}),
    "adversary.discriminator": Entry("dino", discriminator, "discriminator", {**DINO, **PATCH}),
    "adversary.weight": steps(2.0, PATCH),
    "adversary.adaptive": steps(True, PATCH),
    "adversary.adaptive_max": steps(10.0, {**PATCH, "adversary.adaptive": True}),
    "adversary.start_steps": steps(2, PATCH),
    "adversary.start_epochs": steps(0.5, PATCH),
    "adversary.generator_start_steps": steps(2, PATCH),
    "adversary.generator_start_epochs": steps(0.5, PATCH),
    "adversary.disc_updates": steps(2, PATCH),
    "adversary.start_steps schedule": Entry(2, discriminator_update, "update"),
    "adversary.disc_updates schedule": Entry(2, discriminator_update, "update"),
    "adversary.loss": steps("vanilla", PATCH),
    "adversary.generator_loss": steps("non_saturating", PATCH),
    "adversary.lecam_weight": steps(1.0, PATCH),
    "adversary.lecam_decay": steps(0.9, PATCH),
    "adversary.consistency_weight": steps(1.0, {**PATCH, "adversary.augment": 1.0}),
    "adversary.augment": steps(1.0, PATCH),
    "adversary.cutout": steps(0.5, {**PATCH, "adversary.augment": 1.0}),
    "adversary.path": Entry("large", discriminator, "discriminator", DINO),
    "adversary.trunk_heads": Entry(4, discriminator, "discriminator", DINO),
    "adversary.taps": Entry((0, 1), discriminator, "discriminator", DINO),
    "adversary.window": Entry(5, discriminator, "discriminator", DINO),
    "adversary.norm": Entry("group", discriminator, "discriminator", {**PATCH, "adversary.width": 64}),
    "adversary.spectral": Entry(True, discriminator, "discriminator", PATCH),
    "adversary.width": Entry(8, discriminator, "discriminator", PATCH),
    "adversary.layers": Entry(2, discriminator, "discriminator", PATCH),
    "adversary.dtype": Entry("bfloat16", discriminator, "discriminator", PATCH),
    "adversary.norm dino": Entry("group", discriminator, "discriminator", DINO),
    "adversary.spectral dino": Entry(False, discriminator, "discriminator", DINO),
    "adversary.dtype dino": Entry("bfloat16", discriminator, "discriminator", DINO),
    **optimizer("adversary.optimizer", discriminator_update),
    "adversary.optimizer.learning_rate step": steps(1e-3, PATCH),
    "evaluation.metrics": Entry(("encoder",), measured, "metrics"),
    "evaluation.training_metrics": Entry(("encoder",), run, "metrics"),
    "evaluation.images": Entry(5, run, "validation"),
    "evaluation.inception_path": Entry("another", files, "files", METRIC),
    "evaluation.inception_reference": Entry("images/b", run, "references", NETWORKS),
    "evaluation.encoder_cls": Entry("MAEwNorm", error_of(metric_network), "error", METRIC),
    "evaluation.encoder_path": Entry(ENCODERS["dinov2_swiglu"], metric_network, "features", METRIC),
    "evaluation.encoder_input_size": Entry(56, metric_network, "features", METRIC),
    "evaluation.encoder_pool": Entry("mean", metric_network, "features", METRIC),
    "evaluation.encoder_reference": Entry("images/b", run, "references", NETWORKS),
    "evaluation.kernel_images": Entry(4, evaluated, "kernel", MEASURED),
    "evaluation.examples": Entry(2, evaluated, "examples", MEASURED),
    **{
        f"generator.{name}": Entry(value, architecture, "module", TOKENIZED)
        for name, value in {
            "family": "autoregressive",
            "grids": ((4, 4),),
            "levels": 2,
            "num_embeddings": 32,
            "classes": 3,
            "width": 32,
            "depth": 2,
            "heads": 4,
            "mlp": 16,
            "gated": True,
            "qk_norm": False,
            "pos": "rope",
            "adaln": True,
            "registers": 1,
            "dropout": 0.5,
            "tied": False,
            "factors": (4, 4),
            "dtype": "bfloat16",
            "remat": True,
        }.items()
    },
    "generator.class_token": Entry(False, architecture, "module", {**TOKENIZED, "generator.adaln": True}),
    "generator.attention": Entry("cudnn", architecture, "module", {**TOKENIZED, "generator.dtype": "bfloat16"}),
    "generator.input": Entry("codebook", error_of(architecture), "error", TOKENIZED),
    "generator.code_channels": Entry(
        8, architecture, "module", {**TOKENIZED, "generator.code_channels": 4, "generator.input": "codebook"}
    ),
    "generator.tokenizer": Entry("x", completed, "tokenizers", TOKENIZED),
    "generator.tokenizer_hash": Entry("1" * 64, error_of(completed), "error", TOKENIZED),
    "generator.class_dropout": Entry(0.5, generator_loss, "loss", TOKENIZED),
    "generator.schedule": Entry("linear", generator_loss, "loss", TOKENIZED),
    "generator.loss": Entry("bound", generator_loss, "loss", TOKENIZED),
    "generator.smoothing": Entry(0.1, generator_loss, "loss", TOKENIZED),
    "generator.max_snr": Entry(5.0, generator_loss, "loss", BOUND),
    "generator.permuted_steps": Entry(2, generator_loss, "loss", PERMUTED),
    "generator.permuted_epochs": Entry(0.2, generator_loss, "loss", PERMUTED),
    "generator.raster_steps": Entry(3, generator_loss, "loss", PERMUTED),
    "generator.raster_epochs": Entry(0.5, generator_loss, "loss", PERMUTED),
    **{
        f"generator.sampler.{name}": Entry(value, sampled, "pictures evaluation", fields)
        for name, value, fields in [
            ("method", "chance", TOKENIZED),
            ("steps", 3, TOKENIZED),
            ("schedule", "linear", TOKENIZED),
            ("temperature", 0.5, TOKENIZED),
            ("last_temperature", 0.5, TOKENIZED),
            ("remasking", 0.5, TOKENIZED),
            ("choice_temperature", 1.0, TOKENIZED),
            ("top_k", 2, CAUSAL),
            ("top_p", 0.5, CAUSAL),
            ("guidance", 1.0, TOKENIZED),
            ("guidance_schedule", "linear", TOKENIZED),
            ("guidance_power", 2.0, TOKENIZED),
            ("guidance_interval", (0.0, 0.5), TOKENIZED),
        ]
    },
    "evaluation.samples": Entry(20, sample_count, "count", {**TOKENIZED, **MEASURED}),
    "evaluation.guidances": Entry((0.0, 1.0), sampled, "evaluation", TOKENIZED),
    "evaluation.sampler_steps": Entry((2, 3), sampled, "evaluation", TOKENIZED),
    "train.task": Entry("generator", task_kind, "task", {"generator.tokenizer": "x"}),
    **optimizer("optimizer", tokenizer_update),
    "optimizer.learning_rate generator": Entry(1e-3, generator_update, "update", TOKENIZED),
    "optimizer.method generator": Entry("muon", generator_update, "update", TOKENIZED),
    "optimizer.method": Entry("muon", tokenizer_update, "update"),
    "optimizer.learning_rate step": steps(1e-3),
    "optimizer.encoder_rate": steps(0.5),
    "optimizer.quantizer_rate": steps(0.5, {**CODES, "model.quantizer": "simvq"}),
    "optimizer.decoder_rate": steps(0.5),
    "optimizer.constant": steps(("decoder",)),
    "optimizer.accumulate": steps(2),
    "optimizer.ema_decay": steps(0.5),
    "optimizer.ema_warmup": steps(False),
    "train.steps": Entry(5, events, "horizon logged evaluated saved"),
    "train.epochs": Entry(0.5, events, "horizon logged evaluated saved"),
    "train.seed": Entry(1, seeded, "step batches", {"model.noise_tau": 0.5}),
    "train.seed codes": Entry(1, sequences, "batches", TOKENIZED),
    "train.trainable": Entry(("decoder",), step, "step shardings"),
    "train.code_noise": steps(0.5, CODES),
    "train.code_neighbors": steps(4, {**CODES, "train.code_noise": 0.5}),
    "train.start_from": Entry("whole", start, "start"),
    "train.start_parts": Entry(("decoder",), start, "start", {"train.start_from": "whole"}),
    "train.start_renames": Entry(
        {"old": "decoder"}, error_of(start), "error", {"train.start_from": "renamed", "train.start_parts": ("decoder",)}
    ),
    "train.log_every": Entry(2, events, "logged"),
    "train.evaluate_every": Entry(2, events, "evaluated"),
    "train.checkpoint_every": Entry(2, events, "saved"),
    "train.checkpoint_minutes": Entry(1e-9, events, "saved", {"train.log_every": 1}),
    "train.keep_last": Entry(2, run, "keep_last"),
    "train.keep_best": Entry(2, run, "keep_best"),
    "train.keep_every": Entry(2, run, "keep_every"),
    "train.codebook_alarm": Entry(0.5, events, "alarm"),
    "train.hang_seconds": Entry(10.0, events, "hang"),
    "train.log_images": Entry(2, samples, "samples"),
    "train.wandb_project": Entry("a project", events, "wandb"),
    "train.wandb_project check": Entry("a project", error_of(without_wandb), "error"),
    "mesh.data": Entry(4, error_of(run), "error"),
    "mesh.model": Entry(2, run, "mesh"),
    "mesh.slices": Entry(2, run, "mesh"),
    "mesh.fsdp": Entry(True, step, "shardings", {"mesh.fsdp_min_size": 1}),
    "mesh.fsdp_min_size": Entry(1, step, "shardings", {"mesh.fsdp": True}),
}

# Settings of quantizers: another value, and other settings that they are read with.
SETTINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "num_embeddings": (32, {}),
    "commitment_cost": (0.5, {}),
    "vq_decay": (0.5, {}),
    "vq_epsilon": (1e-3, {}),
    "codebook_init": ("data", {"codebook_init": "kmeans"}),
    "revival_threshold": (0.5, {}),
    "quantizer_params.codebook_dim": (4, {}),
    "quantizer_params.whitening_dim": (4, {}),
    "quantizer_params.decay_warmup": (False, {}),
    "quantizer_params.distance": ("l2", {"quantizer_params.distance": "cosine"}),
    "quantizer_params.estimator": ("rotation", {}),
    "quantizer_params.frozen": (True, {}),
    "quantizer_params.diversity_cost": (0.1, {}),
    "quantizer_params.temperature": (0.5, {"quantizer_params.diversity_cost": 0.1}),
    "quantizer_params.codebook_cost": (0.5, {}),
    "quantizer_params.revival_decay": (0.9, {}),
    "quantizer_params.levels": ((4, 3), {}),
    "quantizer_params.adapter": ("linear", {}),
    "quantizer_params.final_temperature": (0.2, {}),
    "quantizer_params.anneal_steps": (100, {}),
    "quantizer_params.orthogonality_cost": (0.1, {}),
    "quantizer_params.entropy_cost": (0.2, {}),
    "quantizer_params.diversity": (0.5, {}),
    "quantizer_params.inner": ("bsq", {}),
    "quantizer_params.grids": ((1, 4), {}),
    "quantizer_params.groups": (3, {}),
    "quantizer_params.depth": (3, {}),
    "quantizer_params.shared": (True, {}),
    "quantizer_params.dropout": (0.5, {}),
    "quantizer_params.input_projection": (True, {}),
    "quantizer_params.bridge_group": (4, {}),
    "quantizer_params.legacy": (False, {}),
}
# Small modules; and codebook_dim of lfq and bsq is their number of bits, without a projection if it is that of z.
SMALL = {"codebook_init": "normal"} | {
    f"quantizer_params.{name}": value for name, value in {"inner": "lfq", "depth": 2, "grids": (2, 4)}.items()
}
BITS = {"num_embeddings": 2**6}


WRAPPED = {f"quantizer_params.{name}" for name in WRAPPERS}


def read_by(quantizer: str) -> set[str]:
    """Returns the settings that a quantizer reads, those of its wrappers included."""
    entry = QUANTIZERS[quantizer]
    wrappers = {f"quantizer_params.{name}" for name in entry.wrappers}
    return wrappers | {setting.path for setting in settings_of(entry.module).values()}


def with_quantizer(quantizer: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {f"model.{path}": value for path, value in {"quantizer": quantizer, **SMALL, **fields}.items()}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The current folder, with the files that fields of the law name."""
    rng = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("law"))
        for name in ("a", "b"):
            for i in range(20):
                write_image(f"images/{name}/{i}.png", rng.integers(0, 256, (70 + 20 * (i % 2), 80, 3)).astype(np.uint8))
            with tarfile.open(f"images/{name}/shard.tar", "w") as tar:
                for i in range(10, 20):
                    tar.add(f"images/{name}/{i}.png")
            plan = codes.Plan("0" * 64, "x", 20, "flip", (2, 2, 4), "uint16", 16, 32, "npz", 20)
            codes.start_dataset(f"images/{name}", plan)
            grids = rng.integers(0, 16, (20, 2, 2, 4)).astype(np.uint16)
            columns = Columns(np.arange(20), ["x"] * 20, np.zeros(20, np.int32), grids)
            codes.write_shard(f"images/{name}", plan, 0, columns)
            codes.finish_dataset(f"images/{name}", plan)
        axes = {"pca_mean": np.zeros(16), "pca_basis": np.eye(16, 2), "pca_var": np.ones(2)}
        np.savez("statistics.npz", mean=np.ones(16), var=np.ones(16), **axes)
        yield


@functools.cache
def observe_base(observe: Callable[[Config], dict[str, Any]], text: str) -> dict[str, Any]:
    return observe(Config.model_validate_json(text))


def changes(observe: Callable[[Config], dict[str, Any]], base: Config, other: Config) -> set[str]:
    """Returns the names of the observations in which two configs differ."""
    assert base != other
    before, after = observe_base(observe, base.model_dump_json()), observe(other)
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def leaves(section: type[Section], prefix: str = "") -> set[str]:
    """Returns the paths of all fields."""
    nested = {f"{prefix}{name}": field.annotation for name, field in section.model_fields.items()}
    sections = {path: kind for path, kind in nested.items() if isinstance(kind, type) and issubclass(kind, Section)}
    return set(nested) - set(sections) | {leaf for path in sections for leaf in leaves(sections[path], f"{path}.")}


def test_every_field_has_an_entry():
    assert leaves(Config) == {name.split()[0] for name in LAW} | {f"model.{path}" for path in SETTINGS}
    assert all_settings().keys() == SETTINGS.keys() == set().union(*map(read_by, QUANTIZERS))


FAST = {LAW[name].observe: name for name in reversed(LAW)}.values()  # one field of each observation; others are slow


@pytest.mark.parametrize("path", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in LAW])
def test_a_field_changes_what_it_should_change(path):
    entry = LAW[path]
    other = build({**entry.fields, path.split()[0]: entry.value})
    assert changes(entry.observe, build(entry.fields), other) == set(entry.changes.split())


def test_the_step_is_the_same_program_whatever_else_a_run_does():
    outside = {path: entry.value for path, entry in LAW.items() if entry.observe in (run, measured, evaluated, events)}
    shared = {"data.image_size", "mesh.model", "mesh.slices"}
    other = build({path: value for path, value in outside.items() if path not in shared and " " not in path})
    assert changes(step, build({}), other) == set()


READ = [(name, path) for name in QUANTIZERS for path in sorted(read_by(name))]
FIRST = {name: (name, path) for name, path in reversed(READ)}.values()  # one of each quantizer; others are slow


@pytest.mark.parametrize(
    ("quantizer", "path"),
    [case if case in FIRST else pytest.param(*case, marks=pytest.mark.slow) for case in READ],
)
def test_a_quantizer_uses_its_settings(quantizer, path):
    value, fields = SETTINGS[path]
    if quantizer in ("lfq", "bsq"):
        fields = fields | BITS
        value = {"quantizer_params.codebook_dim": 6, "num_embeddings": 32}.get(path, value)
    base, other = (build(with_quantizer(quantizer, values)) for values in (fields, {**fields, path: value}))
    if path in WRAPPED and quantizer != "ema":
        assert factory.create(base.model, 6, 4) != factory.create(other.model, 6, 4)
    else:
        assert changes(layer, base, other) == {"layer"}


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_quantizer_ignores_the_other_settings(quantizer):
    inner = read_by("lfq") if "quantizer_params.inner" in read_by(quantizer) else set()
    others = {path: value for path, (value, _) in SETTINGS.items() if path not in read_by(quantizer) | inner}
    configs = [build(with_quantizer(quantizer, {n: v for n, v in f.items() if n in others})) for f in ({}, others)]
    assert factory.create(configs[0].model, 6, 4) == factory.create(configs[1].model, 6, 4)


@pytest.mark.parametrize("observe", {entry.observe: entry for entry in LAW.values()}, ids=lambda f: f.__name__)
def test_an_observation_depends_on_the_config_only(observe):
    config = build(next(entry.fields for entry in LAW.values() if entry.observe is observe))
    assert observe(config) == observe_base(observe, config.model_dump_json())
