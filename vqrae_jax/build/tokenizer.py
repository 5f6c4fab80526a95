"""Builds a tokenizer from its config: the module, its pretrained parameters, and its initial variables."""

import collections
import dataclasses
import functools
import logging
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh
from jaxtyping import Float

from vqrae_jax import sharding
from vqrae_jax.build.encoder import activation_sharding, check_layers, check_names, describe_encoder, read_encoder
from vqrae_jax.config import ModelConfig
from vqrae_jax.errors import ConfigError
from vqrae_jax.models.decoder import SIZES, Decoder, sincos_table, widen_head
from vqrae_jax.models.encoder import Encoder, resample_to_input_size
from vqrae_jax.models.resampler import Resampled
from vqrae_jax.models.vit import BlocksConfig
from vqrae_jax.models.vqrae import VQRAE
from vqrae_jax.pretrained import convert, diffusers_rae, families, pytorch_vqrae, sources, tables, writers
from vqrae_jax.quantizers import factory
from vqrae_jax.quantizers.arrays import AnyArray
from vqrae_jax.quantizers.base import Quantizer
from vqrae_jax.quantizers.fusion import LEARNED, Fused
from vqrae_jax.quantizers.wrappers import fitted_state

log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]
_DECODER = (
    "decoder_hidden_size", "decoder_num_hidden_layers", "decoder_num_attention_heads", "decoder_intermediate_size",
)  # fmt: skip
_OPTIONAL = ("hidden_act", "layer_norm_eps", "qkv_bias")
Placement = Callable[[Any], Any]  # a tree of shapes -> a tree of shardings


@dataclasses.dataclass(frozen=True)
class BuiltTokenizer:
    """A tokenizer's module, and the variables that are known before training."""

    module: VQRAE
    image_size: int  # of reconstructions, pixels
    pretrained: dict[str, Any]  # subtrees of params read from files ("encoder", "decoder"), float32 numpy arrays
    latent_stats: dict[str, Any]  # mean and/or variance: arrays, or shapes of those in a checkpoint
    whitening: Arrays  # state of a whitened quantizer; empty: fitted to the first batch


def build_tokenizer(
    config: ModelConfig, latent_stats: dict[str, Any] | None = None, weights: bool = True, mesh: Mesh | None = None
) -> BuiltTokenizer:
    """Builds the module and reads the pretrained weights that the config names.

    Args:
      latent_stats: statistics in a checkpoint or their shapes, instead of those in normalization_stat_path.
      weights: False reads descriptions only, enough for shapes.
      mesh: mesh that the model will run on; tokens are split over it as batches are. None leaves it to the compiler.
    """
    encoder, folder = describe_encoder(config, mesh)
    decoder = _build_decoder(config, encoder, mesh)
    path, field, whitening, described = config.normalization_stat_path, "model.normalization_stat_path", {}, {}
    shape = (encoder.grid, encoder.grid, encoder.channels)
    if latent_stats is None and path:
        described = _check_statistics(config, encoder)
        whitening = _read_whitening(config, encoder)
        latent_stats = sources.read_latent_statistics(path, field, shape)
    latent_stats = latent_stats or {}
    for name, value in latent_stats.items():
        if value.shape not in (shape, shape[-1:]):
            message = f"{name} has shape {value.shape} (channel last), expected {shape[-1:]} or {shape}"
            raise ConfigError(message, field=field, value=path)
    quantizer = _build_quantizer(config, encoder)
    module = VQRAE(
        encoder, quantizer, decoder, config.noise_tau, config.quantize_before_reshape, config.reshape_to_2d,
        latent_stats=tuple((name, value.shape) for name, value in sorted(latent_stats.items())),
    )  # fmt: skip
    built = BuiltTokenizer(module, decoder.image_size, {}, latent_stats, whitening)
    if weights and folder is not None:
        built.pretrained["encoder"] = params = read_encoder(config, encoder, folder)
        if "sha256" in described and described["sha256"] != writers.content_hash(params):
            raise ConfigError("describes latents of an encoder with other weights", field=field, value=path)
    if weights and config.pretrained_decoder_path:
        built.pretrained["decoder"] = _read_decoder(config, variable_shapes(built)["params"]["decoder"])
    return built


def _build_quantizer(config: ModelConfig, encoder: Encoder) -> Quantizer:
    """Builds the quantizer; in front of it a learned fusion and a resampler, if the config has them."""
    method, blocks = config.encoder_params.fusion, encoder.vit.blocks
    channels = blocks.width if method in LEARNED else encoder.channels
    quantizer = factory.create(config, channels, encoder.grid)
    if config.resampler_tokens:
        blocks = BlocksConfig(
            channels, config.resampler_blocks, blocks.heads, 4 * channels, dtype=config.dtype,
            shard_activations=blocks.shard_activations,
        )  # fmt: skip
        quantizer = Resampled(quantizer, blocks, config.resampler_tokens, config.resampler_nested)
    return Fused(quantizer, channels, len(encoder.layers), method) if method in LEARNED else quantizer


def describe_latents(config: ModelConfig, encoder: Encoder) -> dict[str, Any]:
    """Returns the settings that determine latents, for files of their statistics; JSON values."""
    return {
        "encoder_cls": config.encoder_cls, "layers": [layer % encoder.vit.blocks.depth for layer in encoder.layers],
        "fusion": encoder.fusion, "normalize": encoder.normalize, "encoder_input_size": encoder.input_size,
    }  # fmt: skip


def _check_statistics(config: ModelConfig, encoder: Encoder) -> dict[str, Any]:
    """Raises ConfigError if the file of statistics describes other latents; returns its description."""
    path, field = config.normalization_stat_path, "model.normalization_stat_path"
    described, own = sources.read_latent_description(path, field), describe_latents(config, encoder)
    if described is None:
        if config.encoder_params.layers != (-1,):
            log.warning("%s=%s does not name its latents; they must be of layers=%s", field, path, encoder.layers)
        return {}
    differing = [name for name in own if described.get(name) != own[name]]
    if differing:
        values = ", ".join(f"{name}={described.get(name)!r} instead of {own[name]!r}" for name in differing)
        message = f"describes latents of {values}: run `vqrae latent-statistics` with the settings of this model"
        raise ConfigError(message, field=field, value=path)
    return described


def freeze_encoder(built: BuiltTokenizer) -> BuiltTokenizer:
    """Prepares a tokenizer whose pretrained encoder does not train, see `resample_to_input_size`."""
    if "encoder" not in built.pretrained:
        return built
    encoder, params = resample_to_input_size(built.module.encoder, built.pretrained["encoder"])
    module = built.module.clone(encoder=encoder)
    return dataclasses.replace(built, module=module, pretrained=built.pretrained | {"encoder": params})


def variable_shapes(built: BuiltTokenizer) -> dict[str, Any]:
    """Returns all variables as jax.ShapeDtypeStruct, without computing them."""
    leaves, treedef = _shapes_of_module(built.module)
    return jax.tree.unflatten(treedef, leaves)


@functools.lru_cache(maxsize=64)  # tracing a forward pass takes seconds, and every start needs the shapes several times
def _shapes_of_module(module: VQRAE) -> tuple[list[jax.ShapeDtypeStruct], Any]:
    return jax.tree.flatten({"batch_stats": {}, **jax.eval_shape(_initializer(module), jax.random.key(0))})


def initial_params(
    built: BuiltTokenizer, key: jax.Array, names: Iterable[str], placement: Placement | None = None
) -> dict[str, Any]:
    """Creates the params of `initial_variables`."""
    return initial_variables(built, key, names, placement, batch_stats=False)["params"]


def initial_variables(
    built: BuiltTokenizer, key: jax.Array, names: Iterable[str], placement: Placement | None = None, batch_stats=True
) -> dict[str, Any]:
    """Creates the variables before training.

    Args:
      names: subtrees of params ("encoder", "quantizer", "decoder"): pretrained if files had them, otherwise random.
      placement: creates every leaf on its own devices, so that no device ever holds a whole copy.
      batch_stats: creates the mutable state as well (codebook, latent statistics).
    """
    shapes = variable_shapes(built)
    names = [n for n in names if n in shapes["params"]]
    pretrained = {n: built.pretrained[n] for n in names if n in built.pretrained}
    random = {"params": {n: shapes["params"][n] for n in names if n not in pretrained}}
    if batch_stats:
        random["batch_stats"] = shapes["batch_stats"]
    created = {kind: {} for kind in random}
    if random := {kind: trees for kind, trees in random.items() if trees}:
        state = {"latent": built.latent_stats, "quantizer": built.whitening}
        names = tuple((kind, n) for kind, trees in random.items() for n in trees)
        create = jax.jit(_create, static_argnums=(0, 1), out_shardings=placement(random) if placement else None)
        created |= create(built.module, names, key, state)
    if placement:
        pretrained = jax.tree.map(sharding.place_array, pretrained, placement(pretrained))
    return {**created, "params": created["params"] | pretrained}


def start_quantizer(
    module: VQRAE, variables: Any, x: Float[AnyArray, "B H W C"], key: jax.Array, encoded: bool = False
) -> tuple[Any, dict[str, jax.Array]]:
    """Makes state that starts from data from `x`, images or latents, as the first training step does.

    Returns:
      The variables, and the metrics of the quantizer for `x`.
    """

    def quantize(module: VQRAE, x: AnyArray) -> dict[str, jax.Array]:
        return module.quantize(x if encoded else module.encoder(x), train=True).metrics

    start = functools.partial(module.apply, method=quantize, mutable=["batch_stats"])
    metrics, updated = jax.jit(start)(variables, x, rngs={"codes": key, "noise": key})
    return {**variables, **updated}, metrics


def _create(module: VQRAE, names: tuple[tuple[str, str], ...], key: jax.Array, state: dict[str, Any]) -> Any:
    """Creates the subtrees `names`, pairs of a collection and a part; `state` replaces values in batch_stats."""
    variables = {"batch_stats": {}, **_initializer(module)(key)}
    variables["batch_stats"] |= {n: variables["batch_stats"].get(n, {}) | tree for n, tree in state.items() if tree}
    return unflatten_dict({(kind, n): variables[kind][n] for kind, n in names})


def _initializer(module: VQRAE) -> Callable[[jax.Array], Any]:
    size = module.decoder.image_size
    return functools.partial(module.init, image=jnp.zeros((1, size, size, 3)))


def _build_decoder(config: ModelConfig, encoder: Encoder, mesh: Mesh | None) -> Decoder:
    path = config.decoder_config_path
    values, field = _decoder_architecture(config), f"model.decoder_{'config_path' if path else 'architecture'}"
    if wrong := [name for name in _DECODER if not isinstance(values.get(name), int) or values[name] < 1]:
        raise ConfigError(f"lacks {', '.join(wrong)}, positive integers", field=field, value=path or values)
    width, depth, heads, mlp = (values[name] for name in _DECODER)
    if width % heads or width % 4:
        message = f"decoder_hidden_size={width} must be a multiple of decoder_num_attention_heads={heads} and of 4"
        raise ConfigError(message, field=field, value=path or values)
    blocks = BlocksConfig(
        width, depth, heads, mlp, families.activation({"hidden_act": "gelu", **values}),
        unbiased=families.list_unbiased({"qkv_bias": True, **values}, qkv_bias=families.QKV),
        norm_eps=float(values.get("layer_norm_eps", 1e-12)), remat=config.remat, dtype=config.dtype,
        attention=config.attention, shard_activations=activation_sharding(mesh),
    )  # fmt: skip
    if config.decoder_head == "overlap" and config.decoder_patch_size % 2:
        message = (
            "must be even with model.decoder_head='overlap', whose squares reach half a patch into their neighbours"
        )
        raise ConfigError(message, field="model.decoder_patch_size", value=config.decoder_patch_size)
    check_layers("model.decoder_features", config.decoder_features, encoder.vit.blocks)
    return Decoder(
        blocks, config.decoder_grid or encoder.grid, config.decoder_patch_size, encoder.mean, encoder.std,
        config.decoder_train_pos_embed, tokens=config.resampler_tokens,
        features=len(config.decoder_features) * encoder.vit.blocks.width, overlap=config.decoder_head == "overlap",
        feature_blocks=config.decoder_feature_blocks,
    )  # fmt: skip


def inline_decoder(config: ModelConfig) -> ModelConfig:
    """Returns the config of the same decoder with its architecture in place of a folder or hub id."""
    if config.decoder_config_path in (None, *SIZES):
        return config
    architecture = _decoder_architecture(config)
    return config.model_copy(update={"decoder_config_path": None, "decoder_architecture": architecture})


def _decoder_architecture(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields of a ViT-MAE's config.json that describe the decoder."""
    path, field = config.decoder_config_path, "model.decoder_config_path"
    if (path is None) != bool(config.decoder_architecture):
        raise ConfigError("must be None if decoder_architecture is set, and only then", field=field, value=path)
    if path is None:
        check_names("model.decoder_architecture", config.decoder_architecture, (*_DECODER, *_OPTIONAL))
        return config.decoder_architecture
    if path in SIZES:
        return dict(zip(_DECODER, SIZES[path], strict=True))
    if not pathlib.Path(path).is_dir() and "/" not in path:
        raise ConfigError(f"must be one of {', '.join(SIZES)}, a folder or a hub id", field=field, value=path)
    values = sources.read_json(sources.fetch_folder(path, field) / "config.json", field)
    return {name: values[name] for name in (*_DECODER, *_OPTIONAL) if name in values}


def _read_whitening(config: ModelConfig, encoder: Encoder) -> Arrays:
    """Reads the principal axes of the latents for a whitened quantizer; empty if it or the file has none."""
    path, dim = config.normalization_stat_path, config.quantizer_params.whitening_dim
    if dim is None or config.quantizer == "none":
        return {}
    axes = sources.read_principal_axes(path, "model.normalization_stat_path")
    if axes is None:
        log.info("%s has no principal axes: model.quantizer_params.whitening_dim uses those of the first batch", path)
        return {}
    channels, count = axes["pca_basis"].shape
    if channels != encoder.channels or count < dim:
        raise ConfigError(
            f"has {count} principal axes of {channels} channels, but model.quantizer_params.whitening_dim={dim} needs "
            f"{dim} of {encoder.channels}: run `vqrae latent-statistics --components={dim}` with this encoder",
            field="model.normalization_stat_path", value=path,
        )  # fmt: skip
    return jax.device_get(fitted_state(axes["pca_mean"], axes["pca_basis"], axes["pca_var"], dim))


def _read_decoder(config: ModelConfig, shapes: dict[str, Any]) -> dict[str, Any]:
    path = config.pretrained_decoder_path
    state = _select_decoder(sources.read_state_dict(path, "model.pretrained_decoder_path"), path)
    if "decoder_pos_embed" not in state:
        state = collections.ChainMap({"decoder_pos_embed": diffusers_positions(shapes)}, state)
    target = {n: tree for n, tree in shapes.items() if n != "features"}  # a head that only our own decoders have
    values = 3 * config.decoder_patch_size**2
    widen = config.decoder_head == "overlap" and np.shape(state.get("decoder_pred.bias")) == (values,)
    if widen:
        target["pred"] = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*x.shape[:-1], values), x.dtype), target["pred"])
    params = convert.convert(state, tables.DECODER_TABLE, target, source=path)
    if widen:
        params["pred"] = widen_head(params["pred"], config.decoder_patch_size)
    log.info("read %d decoder tensors from %s", len(state), path)
    if head := shapes.get("features"):
        constants, normal = {"bias": np.zeros, "scale": np.ones}, np.random.default_rng(0).standard_normal

        def create(path: Any, leaf: Any) -> np.ndarray:
            name, shape = path[-1].key, leaf.shape
            return (constants[name](shape) if name in constants else 0.02 * normal(shape)).astype(np.float32)

        params["features"] = jax.tree.map_with_path(create, head)
    return params


def diffusers_positions(shapes: dict[str, Any]) -> np.ndarray:
    """Returns the position table of a decoder of diffusers, which is not in its file; `shapes` are our parameters."""
    _, count, width = shapes["pos_embed"].shape
    return sincos_table(math.isqrt(count - 1), width, diffusers_rae.GRID)


def _select_decoder(state: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """Selects the decoder's state dict from a release or checkpoint of the PyTorch VQRAE, or from our own folder."""
    exported = {n.removeprefix("params/decoder/"): state[n] for n in state if n.startswith("params/decoder/")}
    if exported:
        tree = unflatten_dict({n: x for n, x in exported.items() if not n.startswith("features/")}, sep="/")
        return writers.to_state_dict(tree, tables.DECODER_TABLE)
    state = pytorch_vqrae.select_state_dict(state, "ema" if "ema" in state else "model", path)
    return pytorch_vqrae.select_network(state, tables.DECODER_TABLE, path)
