"""The stages that are timed: one compiled call each, its FLOPs, and the specification for PyTorch."""

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
from vqrae_jax.benchmark.ceilings import Shape
from vqrae_jax.build.tokenizer import initial_params
from vqrae_jax.config import Config, from_dict
from vqrae_jax.preflight.flops import count_products
from vqrae_jax.pretrained import families, tables, writers
from vqrae_jax.quantizers.nearest import nearest
from vqrae_jax.train.tokenizer import TokenizerTask, to_float

NAMES = ("encoder", "codes", "decoder", "quantizer", "train_step")
DINOV2 = {  # width, depth, heads of facebook/dinov2-*
    "tiny": (32, 2, 2),  # for tests
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """A compiled program with its inputs."""

    call: Callable[[], dict[str, jax.Array]]  # runs it once; returns arrays by name, to wait for and to compare
    flops: float  # of matrix products and convolutions, counted from the traced program
    bytes: float  # read and written, by the compiler's count
    memory: int  # bytes of temporaries
    compile_seconds: float  # to trace, lower and compile it
    tensors: dict[str, np.ndarray]  # weights and inputs under PyTorch's names


def product_shapes(args: argparse.Namespace) -> list[Shape]:
    """Returns shapes at which to measure the limit of matrix products: those of the MLP and of the search, squares."""
    width, tokens = DINOV2[args.encoder][0], args.batch * 257
    sizes = (1024, 1536) if jax.default_backend() == "cpu" else (4096, 8192)
    model = [(tokens, 4 * width, width), (tokens, width, 4 * width), (tokens, args.codes, width)]
    return model + [(size, size, size) for size in sizes]


def build(name: str, args: argparse.Namespace) -> tuple[Stage, dict[str, Any]]:
    """Builds a stage on one device with random weights and images; also returns its specification for PyTorch."""
    task = _build_task(args)
    builders = {
        "encoder": _encoder, "codes": functools.partial(_codes, search=args.search), "decoder": _decoder,
        "quantizer": _quantizer, "train_step": _train_step,
    }  # fmt: skip
    return builders[name](task), specification(name, task)


def without_quantizer(stage: Stage, args: argparse.Namespace) -> Callable[[], dict[str, jax.Array]]:
    """Returns the training step of `stage` without its quantizer.

    It runs on the training state of `stage`, because the memory may not hold two.
    """
    task, call = _build_task(argparse.Namespace(**vars(args) | {"quantizer": "none"})), stage.call
    step = _compile(_step_function(task), call.state.replace(batch_stats={}), *call.rest, stateful=True).call.program

    def run() -> dict[str, jax.Array]:
        batch_stats = call.state.batch_stats
        results, state = step(call.state.replace(batch_stats={}), *call.rest)
        call.state = state.replace(batch_stats=batch_stats)
        return results

    return run


def _build_task(args: argparse.Namespace) -> TokenizerTask:
    """Builds a frozen DINOv2, a ViT decoder and a textbook EMA codebook, which PyTorch can compute exactly."""
    width, depth, heads = DINOV2[args.encoder]
    architecture = {
        "model_type": "dinov2", "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads,
        "patch_size": 14, "image_size": 518,
    }  # fmt: skip
    config = from_dict(Config, {
        "model": {
            "encoder_config_path": None, "encoder_params": {"architecture": architecture}, "encoder_input_size": 224,
            "decoder_config_path": args.decoder, "num_embeddings": args.codes, "codebook_init": "normal",
            "revival_threshold": 0.0, "quantizer": args.quantizer, "quantizer_params": {"decay_warmup": False},
            "dtype": args.dtype, "remat": args.remat, "attention": args.attention,
        },
        "loss": {"perceptual": {"weight": float(args.lpips), "dtype": args.dtype}},
        "adversary": {"discriminator": args.adversary, "dtype": args.dtype},
        "data": {"source": "photographs", "image_size": 256, "batch_size": args.batch},
        "optimizer": {"schedule": "constant", "ema_warmup": False},
    })  # fmt: skip
    return TokenizerTask.build(config, sharding.make_mesh(1, 1, jax.devices()[:1]), weights=False)


def _encoder(task: TokenizerTask) -> Stage:
    images, params, module = _images(task), _params(task, "encoder"), task.built.module

    def encode(params: Any, images: jax.Array) -> Any:
        return {"features": module.encoder.apply({"params": params}, to_float(images))}

    return _compile(encode, params, images, tensors=_image_tensors(images) | encoder_tensors(params))


def _codes(task: TokenizerTask, search: str | None) -> Stage:
    """Builds encoder and nearest-code search, the work of tokenizing without its input and output."""
    images, params, codebook, module = _images(task), _params(task, "encoder"), _codebook(task), task.built.module

    def tokenize(params: Any, codebook: jax.Array, images: jax.Array) -> Any:
        latent = module.encoder.apply({"params": params}, to_float(images))
        return {"indices": nearest(latent.reshape(-1, latent.shape[-1]), codebook, block=search)}

    tensors = _image_tensors(images) | encoder_tensors(params) | {"codebook": np.asarray(codebook)}
    return _compile(tokenize, params, codebook, images, tensors=tensors)


def _decoder(task: TokenizerTask) -> Stage:
    latent, params, module = _latent(task), _params(task, "decoder"), task.built.module

    def decode(params: Any, latent: jax.Array) -> Any:
        return {"images": module.decoder.apply({"params": params}, latent)}

    return _compile(decode, params, latent, tensors={"latent": _tokens(latent), **decoder_tensors(params)})


def _quantizer(task: TokenizerTask) -> Stage:
    latent, codebook, quantizer = _latent(task), _codebook(task), task.built.module.quantizer
    shapes = jax.eval_shape(quantizer.init, jax.random.key(0), latent)
    state = {"codebook": codebook, "sums": jnp.copy(codebook), "counts": jnp.ones(len(codebook)), "step": 1}
    variables = jax.tree.map(lambda shape, x: jnp.asarray(x, shape.dtype), shapes, {"batch_stats": state})

    def train(variables: Any, z: jax.Array) -> Any:
        rngs = {"codes": jax.random.key(0)}
        quantized, variables = quantizer.apply(variables, z, True, mutable=["batch_stats"], rngs=rngs)
        return {"loss": quantized.loss, "indices": quantized.indices}, variables

    tensors = {"latent": _tokens(latent), "codebook": np.array(codebook)}
    return _compile(train, variables, latent, stateful=True, tensors=tensors)


def _train_step(task: TokenizerTask) -> Stage:
    images, state, frozen = _images(task), task.init(), _frozen(task)
    tensors = _image_tensors(images) | encoder_tensors(frozen["encoder"])
    tensors |= decoder_tensors(state.params["decoder"])
    if "quantizer" in state.batch_stats:
        tensors["codebook"] = np.array(state.batch_stats["quantizer"]["codebook"])
    return _compile(_step_function(task), state, frozen, {"image": images}, stateful=True, tensors=tensors)


def _step_function(task: TokenizerTask) -> Callable[..., Any]:
    def step(state: Any, frozen: Any, batch: Any) -> Any:
        state, metrics = task.step(state, frozen, batch, jnp.asarray(task.config.train.steps))
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
    """Returns random parameters of all frozen networks; benchmarks load no weights of perceptual networks."""
    rng = np.random.default_rng(3)

    def create(shape: jax.ShapeDtypeStruct) -> jax.Array:
        if shape.ndim < 2:  # scales, biases, and the heads of LPIPS
            return jnp.full(shape.shape, 0.1, shape.dtype)
        fan_in = np.prod(shape.shape[:-1])
        return jnp.asarray(rng.normal(0, (2 / fan_in) ** 0.5, shape.shape), shape.dtype)

    judges = {n: jax.tree.map(create, tree) for n, tree in task.frozen_shapes().items() if n != "encoder"}
    return {"encoder": _params(task, "encoder"), **judges}


@dataclasses.dataclass
class _Stateful:
    """A program that donates its state and returns (results, next state)."""

    program: Any
    state: Any
    rest: tuple[Any, ...]

    def __call__(self) -> dict[str, jax.Array]:
        results, self.state = self.program(self.state, *self.rest)
        return results


def _compile(
    function: Callable, *arguments: Any, stateful: bool = False, tensors: dict[str, np.ndarray] | None = None
) -> Stage:
    """Compiles `function` for `arguments`; a stateful one donates its first and returns (results, next state)."""
    start = time.perf_counter()
    traced = jax.jit(function, donate_argnums=0 if stateful else ()).trace(*arguments)
    program = traced.lower().compile()
    seconds = time.perf_counter() - start
    run = _Stateful(program, arguments[0], arguments[1:]) if stateful else functools.partial(program, *arguments)
    flops = sum(product.flops for product in count_products(traced.jaxpr, jax.default_backend()))
    accessed = (program.cost_analysis() or {}).get("bytes accessed", 0.0)
    return Stage(run, flops, accessed, program.memory_analysis().temp_size_in_bytes, seconds, tensors or {})


def _image_tensors(images: jax.Array) -> dict[str, np.ndarray]:
    return {"images": np.ascontiguousarray(np.asarray(to_float(images)).transpose(0, 3, 1, 2))}


def encoder_tensors(params: Any) -> dict[str, np.ndarray]:
    """Returns the weights of an encoder under the names that `torch_stages` reads."""
    tree = writers.to_state_dict(params, families.FAMILIES["Dinov2withNorm"].table, 5)
    return {f"encoder/{n}": t for n, t in tree.items()}


def decoder_tensors(params: Any) -> dict[str, np.ndarray]:
    """Returns the weights of a decoder under the names that `torch_stages` reads."""
    tree = jax.tree.map(np.array, params)
    return {f"decoder/{n}": t for n, t in writers.to_state_dict(tree, tables.DECODER_TABLE).items()}


def _tokens(latent: jax.Array) -> np.ndarray:
    return np.asarray(latent).reshape(len(latent), -1, latent.shape[-1])


def specification(name: str, task: TokenizerTask) -> dict[str, Any]:
    """Returns the sizes and hyperparameters that `torch_stages` needs, as plain values."""
    config, module = task.config, task.built.module
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
