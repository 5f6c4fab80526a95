"""Builds a generator from its config, once the shape of its codes is known."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from vqrae_jax.build.encoder import activation_sharding
from vqrae_jax.config import GeneratorConfig, from_dict
from vqrae_jax.errors import ConfigError
from vqrae_jax.models.generator import Architecture, CodeTransformer
from vqrae_jax.models.vit import BlocksConfig
from vqrae_jax.models.vqrae import VQRAE

Grids = tuple[tuple[int, int], ...]


def arrange_codes(shape: Sequence[int], prefixes: Sequence[int] = (), side: int | None = None) -> tuple[Grids, int]:
    """Returns the grids of an image's codes and the number of codes per position.

    Args:
      shape: of the codes, (h, w), (h, w, levels), (N,), (N, levels), or flat for several grids.
      prefixes: `Quantizer.prefixes`, the ends of several grids.
      side: `VQRAE.code_grid`; 0: tokens are free of the grid, so that codes are a row. None: not known.

    Raises:
      ConfigError: the positions are not a square, so the tokenizer must be known.
    """
    if side == 0:
        return ((1, shape[0]),), math.prod(shape[1:])
    if len(shape) == 1 and prefixes:
        sizes, levels = np.diff((0, *prefixes)).tolist(), 1
    elif len(shape) > 1 and shape[0] == shape[1] and side in (None, shape[0]):
        sizes, levels = [shape[0] * shape[1]], math.prod(shape[2:])
    else:
        sizes, levels = [shape[0]], math.prod(shape[1:])
    grids = tuple((math.isqrt(size), math.isqrt(size)) for size in sizes)
    if [h * w for h, w in grids] != sizes:
        message = f"is needed to know the grids of codes of shape {tuple(shape)}"
        raise ConfigError(message, field="generator.tokenizer", value=None)
    return grids, levels


def complete(config: GeneratorConfig, source: str, origins: Mapping[str, str], **fields: Any) -> GeneratorConfig:
    """Returns the config with fields that a source decides; None and () are unknown.

    Args:
      source: subject and verb of messages, for example "the codes have".
      origins: sources that have set fields of the config, by field.

    Raises:
      ConfigError: a field is set to another value, or another source has one.
    """
    updates = {}
    for name, value in fields.items():
        value = tuple(map(tuple, value)) if name == "grids" else value
        if value in (None, ()):
            continue
        if (present := getattr(config, name)) not in (None, (), value) and (name, present) != ("code_channels", 0):
            if name in origins:
                message = f"{origins[name]} {present!r}, but {source} {value!r}; use those that belong together"
                raise ConfigError(message, field=f"generator.{name}")
            raise ConfigError(f"{source} {value!r}; leave it out", field=f"generator.{name}", value=present)
        updates[name] = value
    # Validated again, because the factors must fit the number of codes.
    values = config.model_dump() | updates
    return from_dict(GeneratorConfig, values, lambda error: error.renamed({error.field: f"generator.{error.field}"}))


def build_generator(config: GeneratorConfig, mesh: Mesh | None = None) -> CodeTransformer:
    """Builds the module for a mesh, over which tokens are split as batches are.

    Raises:
      ConfigError: the shape of the codes is not known.
    """
    shape = {name: getattr(config, name) for name in ("grids", "levels", "num_embeddings", "classes")}
    shape |= {"code_channels": config.code_channels or None} if config.input == "codebook" else {}
    if missing := [f"generator.{name}" for name, value in shape.items() if value in (None, ())]:
        message = f"no data or tokenizer that is read decides it; set {', '.join(missing)}"
        raise ConfigError(message, field=missing[0])
    if config.classes and not (config.class_token or config.adaln):
        message = "the network does not see the class; set class_token or adaln, or classes=0"
        raise ConfigError(message, field="generator.class_token", value=False)
    blocks = BlocksConfig(
        config.width, config.depth, config.heads, config.mlp, act="silu" if config.gated else "gelu",
        gated=config.gated, qk_norm=config.qk_norm, causal=config.family == "autoregressive", dropout=config.dropout,
        remat=config.remat, dtype=config.dtype, attention=config.attention,
        shard_activations=activation_sharding(mesh, free=True),
    )  # fmt: skip
    architecture = Architecture(
        blocks, config.num_embeddings, config.grids, config.levels, config.classes, config.class_token, config.adaln,
        config.registers, config.pos, code_channels=config.code_channels if config.input == "codebook" else 0,
        tied=config.tied, factors=config.factors,
    )  # fmt: skip
    return CodeTransformer(architecture)


def variable_shapes(module: CodeTransformer) -> dict[str, Any]:
    """Returns {"params", "batch_stats"} as jax.ShapeDtypeStruct; the codebook of the input is in batch_stats."""
    return jax.eval_shape(lambda: initial_variables(module, jax.random.key(0)))


def initial_variables(
    module: CodeTransformer, key: jax.Array, vectors: Float[jax.Array, "L K C"] | None = None
) -> dict[str, Any]:
    """Creates the variables before training; `vectors` are those of `code_vectors`. Use it under `jit`."""
    variables = module.init(key, jnp.zeros((1, module.config.length), jnp.int32))
    frozen = variables.get("frozen", {})
    if frozen and vectors is not None:
        frozen = {"code_vectors": jnp.asarray(vectors)}
    return {"params": {"generator": variables["params"]}, "batch_stats": {"generator": frozen} if frozen else {}}


def module_variables(variables: dict[str, Any]) -> dict[str, Any]:
    """Returns the variables of the module from those of a state, {"params", "batch_stats"}."""
    return {"params": variables["params"]["generator"], "frozen": variables["batch_stats"].get("generator", {})}


def code_vectors(tokenizer: VQRAE, variables: Any, shape: Sequence[int], levels: int) -> Float[np.ndarray, "L K C"]:
    """Returns the latents of the codes of each level, without their mean and of unit variance.

    A code's vector is the latent of a position whose other levels have code 0: what the code adds to it, as levels are
    added or concatenated. `shape` is that of an image's codes.

    Raises:
      ConfigError: the tokenizer has several grids, whose codes have no latent of their own.
    """
    if len(shape) == 1 and tokenizer.quantizer.prefixes and tokenizer.code_grid:
        message = "needs one grid; a multiscale tokenizer has several, use input='table'"
        raise ConfigError(message, field="generator.input", value="codebook")
    codes = tokenizer.quantizer.num_embeddings
    single = levels == 1 and len(shape) < 3

    @jax.jit
    def lookup(variables: Any, level: jax.Array) -> jax.Array:
        indices = jnp.zeros((codes, levels), jnp.int32).at[:, level].set(jnp.arange(codes))
        method = lambda model, indices: model.quantizer.lookup(indices)  # noqa: E731
        latents = tokenizer.apply(variables, indices[:, 0] if single else indices, method=method)
        return latents.reshape(codes, -1) - latents.reshape(codes, -1).mean(0)

    vectors = np.stack([jax.device_get(lookup(variables, level)) for level in range(levels)]).astype(np.float32)
    return vectors / max(float(vectors.std()), 1e-12)
