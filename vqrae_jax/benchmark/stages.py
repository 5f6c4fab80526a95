"""The stages of a tokenizer as things to time: one compiled call each, its analytic FLOPs, and what PyTorch is told."""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqrae_jax import sharding
from vqrae_jax.build.tokenizer import initial_params
from vqrae_jax.config import Config, from_dict
from vqrae_jax.models.encoder import with_matmul
from vqrae_jax.models.stacking import restack_blocks
from vqrae_jax.models.vqrae import VQRAE
from vqrae_jax.preflight import flops
from vqrae_jax.pretrained import families, tables, writers
from vqrae_jax.quantizers.nearest import Tile, Way, nearest
from vqrae_jax.train.tokenizer import TokenizerTask, to_float

NAMES = ("encoder", "codes", "decoder", "quantizer", "train_step")
SEARCHES = {
    "own": None, "float32": "float32", "kernel": Tile(), "tensor_cores": Tile(precision="TF32_TF32_F32_X3"),
}  # fmt: skip
DINOV2 = {  # width, depth, heads of facebook/dinov2-*
    "tiny": (32, 2, 2),  # for tests
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """Something to time.

    Attributes:
      call: runs it once; gives arrays by name, to wait for and to compare.
      flops: of matrix products and convolutions, counted from the traced program.
      bytes: read and written, as the compiler counts them.
      memory: bytes of temporaries.
      compile_seconds: of tracing, lowering and compiling it.
      tensors: weights and inputs under PyTorch's names.
    """

    name: str
    call: Callable[[], dict[str, jax.Array]]
    flops: float
    bytes: float
    memory: int
    compile_seconds: float
    tensors: dict[str, np.ndarray]


def settings(given: argparse.Namespace) -> Config:
    """DINOv2 frozen, a ViT decoder and a textbook EMA codebook, so that PyTorch can compute exactly the same."""
    width, depth, heads = DINOV2[given.encoder]
    architecture = {
        "model_type": "dinov2", "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads,
        "patch_size": 14, "image_size": 518,
    }  # fmt: skip
    return from_dict(Config, {
        "model": {
            "encoder_config_path": None, "encoder_params": {"architecture": architecture}, "encoder_input_size": 224,
            "decoder_config_path": given.decoder, "num_embeddings": given.codes, "codebook_init": "normal",
            "revival_threshold": 0.0, "quantizer": given.quantizer, "quantizer_params": {"decay_warmup": False},
            "dtype": given.dtype, "scan_layers": given.scan, "remat": given.remat, "attention": given.attention,
        },
        "loss": {"perceptual": {"weight": float(given.lpips), "dtype": given.dtype}},
        "adversary": {"discriminator": given.adversary, "dtype": given.dtype},
        "data": {"source": "photographs", "image_size": 256, "batch_size": given.batch},
        "optimizer": {"schedule": "constant", "ema_warmup": False},
    })  # fmt: skip


def build(name: str, given: argparse.Namespace) -> tuple[Stage, dict[str, Any]]:
    """The stage `name` of NAMES on one device, with random weights and pictures, and what PyTorch is told of it."""
    task = _task(given)
    builders = {
        "encoder": _encoder, "codes": functools.partial(_codes, block=SEARCHES[given.search]), "decoder": _decoder,
        "quantizer": _quantizer, "train_step": _train_step,
    }  # fmt: skip
    module = task.built.module
    if given.matmul != "dtype":
        module = module.clone(encoder=with_matmul(module.encoder, given.matmul))
    return builders[name](task, module), specification(name, task.config, task.built.module)


def _task(given: argparse.Namespace) -> TokenizerTask:
    return TokenizerTask.build(settings(given), sharding.make_mesh(1, 1, jax.devices()[:1]), weights=False)


def _encoder(task: TokenizerTask, module: VQRAE) -> Stage:
    images, params = _images(task), _params(task, "encoder")

    def encode(params: Any, images: jax.Array) -> Any:
        return {"features": module.encoder.apply({"params": params}, to_float(images))}

    return _stage("encoder", _compile(encode, params, images), _image_tensors(images) | _encoder_tensors(params))


def _codes(task: TokenizerTask, module: VQRAE, block: Way | None) -> Stage:
    """Tokenizing without reading or writing: encoder and search."""
    images, params, codebook = _images(task), _params(task, "encoder"), _codebook(task)

    def tokenize(params: Any, codebook: jax.Array, images: jax.Array) -> Any:
        latent = module.encoder.apply({"params": params}, to_float(images))
        return {"indices": nearest(latent.reshape(-1, latent.shape[-1]), codebook, block=block)}

    tensors = _image_tensors(images) | _encoder_tensors(params) | {"codebook": np.asarray(codebook)}
    return _stage("codes", _compile(tokenize, params, codebook, images), tensors)


def _decoder(task: TokenizerTask, module: VQRAE) -> Stage:
    latent, params = _latent(task), _params(task, "decoder")

    def paint(params: Any, latent: jax.Array) -> Any:
        return {"pictures": module.decoder.apply({"params": params}, latent)}

    tensors = {"latent": _tokens(latent), **_decoder_tensors(params)}
    return _stage("decoder", _compile(paint, params, latent), tensors)


def _quantizer(task: TokenizerTask, module: VQRAE) -> Stage:
    latent, codebook = _latent(task), _codebook(task)
    variables = jax.eval_shape(module.quantizer.init, jax.random.key(0), latent)
    state = {"codebook": codebook, "sums": jnp.copy(codebook), "counts": jnp.ones(len(codebook)), "step": 1}
    variables = jax.tree.map(lambda want, x: jnp.asarray(x, want.dtype), variables, {"batch_stats": state})

    def train(variables: Any, z: jax.Array) -> Any:
        out, changed = module.quantizer.apply(
            variables, z, True, mutable=["batch_stats"], rngs={"codes": jax.random.key(0)}
        )
        return {"loss": out.loss, "indices": out.indices}, changed

    tensors = {"latent": _tokens(latent), "codebook": np.array(codebook)}
    return _stage("quantizer", _compile(train, variables, latent, stateful=True), tensors)


def _train_step(task: TokenizerTask, module: VQRAE) -> Stage:
    images, state, frozen = _images(task), task.init(), _frozen(task)
    tensors = _image_tensors(images) | _encoder_tensors(frozen["encoder"])
    tensors |= _decoder_tensors(state.params["decoder"])
    if "quantizer" in state.batch_stats:
        tensors["codebook"] = np.array(state.batch_stats["quantizer"]["codebook"])

    return _stage("train_step", _compile(_step(task), state, frozen, {"image": images}, stateful=True), tensors)


def without_quantizer(stage: Stage, given: argparse.Namespace) -> Callable[[], dict[str, jax.Array]]:
    """The training step of `stage` without its quantizer, on the same state: two may not fit into the memory."""
    task, whole = _task(argparse.Namespace(**vars(given) | {"quantizer": "none"})), stage.call
    bare = _compile(_step(task), whole.state.replace(batch_stats={}), *whole.rest, stateful=True).program

    def call() -> dict[str, jax.Array]:
        codebook = whole.state.batch_stats
        out, state = bare(whole.state.replace(batch_stats={}), *whole.rest)
        whole.state = state.replace(batch_stats=codebook)
        return out

    return call


def _step(task: TokenizerTask) -> Callable[..., Any]:
    def step(state: Any, frozen: Any, batch: Any) -> Any:
        state, metrics = task.step(state, frozen, batch)
        return {"loss": metrics["loss/total"], "pixel": metrics["loss/pixel"]}, state

    return step


def _images(task: TokenizerTask) -> jax.Array:
    size = task.config.data.image_size
    shape = (task.config.data.batch_size, size, size, 3)
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))


def _latent(task: TokenizerTask) -> jax.Array:
    encoder = task.built.module.encoder
    shape = (task.config.data.batch_size, encoder.grid, encoder.grid, encoder.channels)
    return jax.random.normal(jax.random.key(1), shape)


def _params(task: TokenizerTask, name: str) -> Any:
    return initial_params(task.built, jax.random.key(0), [name])[name]


def _codebook(task: TokenizerTask) -> jax.Array:
    shape = (task.config.model.num_embeddings, task.built.module.encoder.channels)
    return jax.random.normal(jax.random.key(2), shape)


def _frozen(task: TokenizerTask) -> Any:
    """Random values for every network that the step reads: no weights are at hand for those that judge."""
    rng = np.random.default_rng(3)

    def draw(shape: jax.ShapeDtypeStruct) -> jax.Array:
        if shape.ndim < 2:  # scales, biases, and the heads of LPIPS
            return jnp.full(shape.shape, 0.1, shape.dtype)
        fan_in = np.prod(shape.shape[:-1])
        return jnp.asarray(rng.normal(0, (2 / fan_in) ** 0.5, shape.shape), shape.dtype)

    critics = {n: jax.tree.map(draw, tree) for n, tree in task.frozen_shapes().items() if n != "encoder"}
    return {"encoder": _params(task, "encoder"), **critics}


@dataclasses.dataclass
class _Stateful:
    """A program that is given up its state and returns (result, next state)."""

    program: Any
    state: Any
    rest: tuple[Any, ...]

    def __call__(self) -> dict[str, jax.Array]:
        out, self.state = self.program(self.state, *self.rest)
        return out


@dataclasses.dataclass(frozen=True)
class _Compiled:
    program: Any
    call: Callable[[], dict[str, jax.Array]]
    flops: float
    seconds: float


def _compile(function: Callable, *arguments: Any, stateful: bool = False) -> _Compiled:
    """`function` of `arguments`; a stateful one is given up its first argument and returns (result, successor)."""
    start = time.perf_counter()
    traced = jax.jit(function, donate_argnums=0 if stateful else ()).trace(*arguments)
    program = traced.lower().compile()
    seconds = time.perf_counter() - start
    total = sum(product.flops for product in flops.count(traced.jaxpr, jax.default_backend()))
    if not stateful:
        return _Compiled(program, functools.partial(program, *arguments), total, seconds)
    return _Compiled(program, _Stateful(program, arguments[0], arguments[1:]), total, seconds)


def _stage(name: str, compiled: _Compiled, tensors: dict[str, np.ndarray]) -> Stage:
    cost = compiled.program.cost_analysis() or {}
    memory = compiled.program.memory_analysis().temp_size_in_bytes
    moved = cost.get("bytes accessed", 0.0)
    return Stage(name, compiled.call, compiled.flops, moved, memory, compiled.seconds, tensors)


def _image_tensors(images: jax.Array) -> dict[str, np.ndarray]:
    return {"images": np.ascontiguousarray(np.asarray(to_float(images)).transpose(0, 3, 1, 2))}


def _encoder_tensors(params: Any) -> dict[str, np.ndarray]:
    tree = writers.to_state_dict(restack_blocks(params, {"vit": False}), families.FAMILIES["Dinov2withNorm"].table, 5)
    return {f"encoder/{n}": t for n, t in tree.items()}


def _decoder_tensors(params: Any) -> dict[str, np.ndarray]:
    tree = restack_blocks(jax.tree.map(np.array, params), {"": False})
    return {f"decoder/{n}": t for n, t in writers.to_state_dict(tree, tables.DECODER_TABLE).items()}


def _tokens(latent: jax.Array) -> np.ndarray:
    return np.asarray(latent).reshape(len(latent), -1, latent.shape[-1])


def specification(name: str, config: Config, module: VQRAE) -> dict[str, Any]:
    """What the PyTorch program has to know, plain values."""
    blocks, decoder = module.encoder.vit.blocks, module.decoder
    return {
        "stage": name,
        "platform": jax.default_backend(),
        "dtype": config.model.dtype,
        "input_size": module.encoder.input_size,
        "encoder": {
            "hidden_size": blocks.width, "num_hidden_layers": blocks.depth, "num_attention_heads": blocks.heads,
            "image_size": module.encoder.vit.grid * module.encoder.vit.patch, "patch_size": module.encoder.vit.patch,
        },
        "mean": module.encoder.mean,
        "std": module.encoder.std,
        "channels": module.encoder.channels,
        "decoder": {
            "width": decoder.blocks.width, "depth": decoder.blocks.depth, "heads": decoder.blocks.heads,
            "mlp": decoder.blocks.mlp, "eps": decoder.blocks.norm_eps, "grid": decoder.grid, "patch": decoder.patch,
        },
        "quantizer": {
            "decay": config.model.vq_decay, "epsilon": config.model.vq_epsilon,
            "commitment": config.model.commitment_cost,
        },
        "optimizer": {
            "lr": config.optimizer.learning_rate, "betas": (config.optimizer.b1, config.optimizer.b2),
            "weight_decay": config.optimizer.weight_decay,
        },
        "ema_decay": config.optimizer.ema_decay,
    }  # fmt: skip
