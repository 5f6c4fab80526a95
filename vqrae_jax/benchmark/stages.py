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
from vqrae_jax.config import Config, from_dict
from vqrae_jax.models.vit import unstack_blocks
from vqrae_jax.models.vqrae import VQRAE
from vqrae_jax.preflight import flops
from vqrae_jax.pretrained import export, families, tables
from vqrae_jax.train.tokenizer import TokenizerTask

NAMES = ("encoder", "decoder", "quantizer", "train_step")
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
            "dtype": given.dtype, "scan_layers": given.scan, "remat": given.remat,
        },
        "data": {"source": "photographs", "image_size": 256, "batch_size": given.batch},
        "optimizer": {"schedule": "constant", "ema_warmup": False},
    })  # fmt: skip


def build(name: str, config: Config) -> tuple[Stage, VQRAE]:
    """The stage `name` of NAMES on one device, with random weights and pictures, and the model it is of."""
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    task = TokenizerTask.build(config, mesh)
    module, batch = task.assembly.module, config.data.batch_size
    images = np.random.default_rng(0).integers(0, 256, (batch, 256, 256, 3), np.uint8)
    frozen, state = task.frozen(), task.init()
    pixels = jnp.asarray(images, jnp.float32) / 255
    grid, channels = module.encoder.grid, module.encoder.channels
    latent = jax.random.normal(jax.random.key(1), (batch, grid, grid, channels))
    tensors = {}
    if name in ("encoder", "train_step"):
        tensors |= {"images": np.ascontiguousarray(np.asarray(pixels).transpose(0, 3, 1, 2))}
        tree = export.to_state_dict(frozen["encoder"], families.FAMILIES["Dinov2withNorm"].table, 5)
        tensors |= {f"encoder/{n}": t for n, t in tree.items()}
    if name in ("decoder", "train_step"):
        tensors |= _decoder_tensors(task, state)
    if name in ("decoder", "quantizer"):
        tensors["latent"] = np.asarray(latent).reshape(batch, grid * grid, channels)
    codebook = state.batch_stats.get("quantizer", {}).get("codebook")
    if name in ("quantizer", "train_step") and codebook is not None:
        tensors["codebook"] = np.array(codebook)
    if name == "train_step":
        return _train_step(task, state, frozen, {"image": jnp.asarray(images)}, tensors), module
    params = {**frozen, **state.params}
    parts: dict[str, tuple[Callable, tuple]] = {
        "encoder": (lambda p, x: {"features": module.encoder.apply({"params": p}, x)}, (params["encoder"], pixels)),
        "decoder": (lambda p, x: {"pictures": module.decoder.apply({"params": p}, x)}, (params["decoder"], latent)),
    }
    if name == "quantizer":
        return _quantizer(module.quantizer, state, latent, tensors), module
    function, arguments = parts[name]
    compiled = _compile(function, arguments)
    return _stage(name, functools.partial(compiled.run, *arguments), compiled, tensors), module


@dataclasses.dataclass(frozen=True)
class _Compiled:
    run: Callable
    flops: float
    seconds: float


def _compile(function: Callable, arguments: tuple, donate: tuple[int, ...] = ()) -> _Compiled:
    start = time.perf_counter()
    traced = jax.jit(function, donate_argnums=donate).trace(*arguments)
    compiled = traced.lower().compile()
    seconds = time.perf_counter() - start
    return _Compiled(compiled, sum(product.flops for product in flops.count(traced.jaxpr)), seconds)


def _stage(name: str, call: Callable, compiled: _Compiled, tensors: dict[str, np.ndarray]) -> Stage:
    cost = compiled.run.cost_analysis() or {}
    memory = compiled.run.memory_analysis().temp_size_in_bytes
    return Stage(name, call, compiled.flops, cost.get("bytes accessed", 0.0), memory, compiled.seconds, tensors)


def _train_step(task: TokenizerTask, state: Any, frozen: Any, batch: Any, tensors: dict[str, np.ndarray]) -> Stage:
    compiled = _compile(task.step, (state, frozen, batch), donate=(0,))
    kept = {"state": state}

    def call() -> dict[str, jax.Array]:
        kept["state"], metrics = compiled.run(kept["state"], frozen, batch)
        return {"loss": metrics["loss/total"], "pixel": metrics["loss/pixel"]}

    return _stage("train_step", call, compiled, tensors)


def _quantizer(module: Any, state: Any, latent: jax.Array, tensors: dict[str, np.ndarray]) -> Stage:
    variables = {"params": state.params.get("quantizer", {}), "batch_stats": state.batch_stats["quantizer"]}

    def train(variables: Any, z: jax.Array) -> Any:
        out, changed = module.apply(variables, z, True, mutable=["batch_stats"], rngs={"codes": jax.random.key(0)})
        return {"loss": out.loss, "indices": out.indices}, {**variables, **changed}

    compiled = _compile(train, (variables, latent), donate=(0,))
    kept = {"variables": variables}

    def call() -> dict[str, jax.Array]:
        out, kept["variables"] = compiled.run(kept["variables"], latent)
        return out

    return _stage("quantizer", call, compiled, tensors)


def _decoder_tensors(task: TokenizerTask, state: Any) -> dict[str, np.ndarray]:
    tree = jax.tree.map(np.array, state.params["decoder"])
    tree = unstack_blocks(tree) if task.config.model.scan_layers else tree
    return {f"decoder/{n}": t for n, t in export.to_state_dict(tree, tables.DECODER_TABLE).items()}


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
