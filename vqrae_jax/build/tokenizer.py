"""One way to build a model: config -> (module, parameters that are known before training)."""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from vqrae_jax import sharding
from vqrae_jax.build.encoder import activation_spread, check_layers, describe_encoder, read_encoder
from vqrae_jax.config import ModelConfig
from vqrae_jax.errors import ConfigError
from vqrae_jax.models.decoder import SIZES, Decoder
from vqrae_jax.models.encoder import Encoder, at_input_size, scanned
from vqrae_jax.models.stacking import stack_blocks, unstack_blocks
from vqrae_jax.models.vit import BlocksConfig, Spread
from vqrae_jax.models.vqrae import VQRAE
from vqrae_jax.pretrained import convert, families, pytorch_vqrae, sources, tables, writers
from vqrae_jax.quantizers import factory
from vqrae_jax.quantizers.base import Quantizer
from vqrae_jax.quantizers.whitened import fitted_state

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class BuiltTokenizer:
    """A model that is ready to be given its variables."""

    module: VQRAE
    image_size: int  # of the pictures it paints
    pretrained: dict[str, Any]  # subtrees of params read from files: encoder, decoder (numpy, float32)
    latent_stats: dict[str, np.ndarray]  # mean and/or var
    whitening: dict[str, np.ndarray]  # state of a whitened quantizer from known axes; empty: the first batch's


def build_tokenizer(
    config: ModelConfig,
    latent_stats: dict[str, np.ndarray] | None = None,
    weights: bool = True,
    mesh: Mesh | None = None,
) -> BuiltTokenizer:
    """Builds the module and reads the pretrained weights that the config names.

    Args:
      config: the model section.
      latent_stats: statistics that are already at hand (from a checkpoint) instead of normalization_stat_path.
      weights: False reads the descriptions only, for shapes.
      mesh: that the model will run on; tokens are split over it as batches are. None: left to the compiler.

    Raises:
      ConfigError, WeightsError: naming the field, before anything is compiled.
    """
    encoder, folder = describe_encoder(config, mesh)
    decoder = _decoder(config, encoder, activation_spread(mesh))
    whitening = {}
    if latent_stats is None and config.normalization_stat_path:
        whitening = _whitening(config, encoder)
        latent_stats = sources.read_latent_statistics(config.normalization_stat_path, "model.normalization_stat_path")
    latent_stats = latent_stats or {}
    _check_latent_stats(config, encoder, latent_stats)
    module = VQRAE(
        encoder=encoder,
        quantizer=_quantizer(config, encoder),
        decoder=decoder,
        noise_tau=config.noise_tau,
        quantize_before_reshape=config.quantize_before_reshape,
        reshape_to_2d=config.reshape_to_2d,
        latent_stats=tuple((name, value.shape) for name, value in sorted(latent_stats.items())),
    )
    built = BuiltTokenizer(module, decoder.image_size, {}, latent_stats, whitening)
    if weights:
        built.pretrained.update(_read_weights(config, built, folder))
    return built


def variable_shapes(built: BuiltTokenizer) -> dict[str, Any]:
    """All variables as jax.ShapeDtypeStruct, nothing computed."""
    return {"batch_stats": {}, **jax.eval_shape(_initialize(built.module), jax.random.key(0))}


def freeze_encoder(built: BuiltTokenizer, scan: bool = False) -> BuiltTokenizer:
    """The built to run when nothing changes the pretrained encoder.

    Its position grid is that of the input size; with `scan` its blocks are stacked.
    """
    encoder, params = built.module.encoder, built.pretrained.get("encoder")
    if params is not None:
        encoder, params = at_input_size(encoder, params)
    if scan:
        encoder, params = scanned(encoder, params)
    read = {} if params is None else {"encoder": params}
    return dataclasses.replace(built, module=built.module.clone(encoder=encoder), pretrained=built.pretrained | read)


Placement = Callable[[Any], Any]  # a tree of shapes -> a tree of shardings


def initial_params(built: BuiltTokenizer, key: jax.Array, names: Iterable[str], place: Placement | None = None) -> Any:
    """The chosen subtrees of params (encoder, quantizer, decoder): pretrained where files gave them, else random.

    With `place`, every leaf is created where it will live; no device ever holds a whole copy.
    """
    return _create(built, key, names, place, batch_stats=False)["params"]


def initial_variables(
    built: BuiltTokenizer, key: jax.Array, names: Iterable[str], place: Placement | None = None
) -> Any:
    """`initial_params`, and with them the mutable state before training (codebook, fixed latent statistics)."""
    return _create(built, key, names, place, batch_stats=True)


def _create(
    built: BuiltTokenizer, key: jax.Array, names: Iterable[str], place: Placement | None, batch_stats: bool
) -> dict[str, Any]:
    want = variable_shapes(built)
    params = {n: want["params"][n] for n in names if n in want["params"]}
    read = {n: built.pretrained[n] for n in params if n in built.pretrained}
    draw = {"params": {n: tree for n, tree in params.items() if n not in read}}
    if batch_stats:
        draw["batch_stats"] = want["batch_stats"]
    init = _initialize(built.module)

    def create(key: jax.Array) -> dict[str, Any]:
        variables = {"batch_stats": {}, **init(key)}
        if built.latent_stats:
            variables["batch_stats"]["latent"] = {n: jnp.asarray(v) for n, v in built.latent_stats.items()}
        if built.whitening:
            variables["batch_stats"]["quantizer"] |= built.whitening
        return {kind: {n: variables[kind][n] for n in trees} for kind, trees in draw.items()}

    drawn = jax.jit(create, out_shardings=place(draw) if place else None)(key) if any(draw.values()) else draw
    return {
        **drawn,
        "params": drawn["params"] | (jax.tree.map(sharding.place_array, read, place(read)) if place else read),
    }


def _initialize(module: VQRAE):
    size = module.decoder.image_size
    return functools.partial(module.init, image=jnp.zeros((1, size, size, 3)))


def _decoder(config: ModelConfig, encoder: Encoder, where: Spread) -> Decoder:
    if config.decoder_config_path in SIZES:
        width, depth, heads, mlp = SIZES[config.decoder_config_path]
        act, eps = "gelu", 1e-12
    else:
        width, depth, heads, mlp, act, eps = _read_decoder_config(config.decoder_config_path)
    if width % heads or width % 4:
        raise ConfigError(
            f"model.decoder_config_path={config.decoder_config_path!r}: decoder_hidden_size={width} must be divisible "
            f"by decoder_num_attention_heads={heads}, and by 4 for its position table"
        )
    blocks = BlocksConfig(
        width=width, depth=depth, heads=heads, mlp=mlp, act=act, norm_eps=eps,
        scan=config.scan_layers, remat=config.remat, dtype=config.dtype, attention=config.attention, spread=where,
    )  # fmt: skip
    check_layers("model.decoder_features", config.decoder_features, encoder.vit.blocks)
    return Decoder(
        blocks, encoder.grid, config.decoder_patch_size, encoder.mean, encoder.std, config.decoder_train_pos_embed,
        features=len(config.decoder_features) * encoder.vit.blocks.width,
    )  # fmt: skip


def _read_decoder_config(path: str) -> tuple[int, int, int, int, str, float]:
    """The decoder fields of a ViT-MAE config.json; its other fields are placeholders."""
    field = "model.decoder_config_path"
    if not pathlib.Path(path).expanduser().is_dir() and "/" not in path:
        raise ConfigError(f"{field}={path!r} is neither a size ({', '.join(SIZES)}), a folder nor a hub id")
    given = sources.read_json(sources.fetch_folder(path, field) / "config.json", field)
    try:
        numbers = [
            int(given[f"decoder_{n}"])
            for n in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        ]
        return *numbers, families.activation({"hidden_act": "gelu", **given}), float(given.get("layer_norm_eps", 1e-12))
    except KeyError as error:
        raise ConfigError(f"{field}={path!r}: its config.json lacks {error.args[0]}") from None


def _quantizer(config: ModelConfig, encoder: Encoder) -> Quantizer:
    try:
        return factory.create(config, encoder.channels, encoder.grid)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from None


def _check_latent_stats(config: ModelConfig, encoder: Encoder, stats: dict[str, np.ndarray]) -> None:
    accepted = [(encoder.channels,), (encoder.grid, encoder.grid, encoder.channels)]
    for name, value in stats.items():
        if value.shape not in accepted:
            raise ConfigError(
                f"model.normalization_stat_path={config.normalization_stat_path!r}: {name} has shape "
                f"{value.shape} (channel last), the latent of this encoder at {config.encoder_input_size} pixels needs "
                f"{accepted[0]} or {accepted[1]}"
            )


def _whitening(config: ModelConfig, encoder: Encoder) -> dict[str, np.ndarray]:
    """The principal axes of the latents, if the quantizer wants them and the file of the statistics has them."""
    path, dim = config.normalization_stat_path, config.quantizer_params.whitening_dim
    if dim is None or config.quantizer == "none":
        return {}
    axes = sources.read_principal_axes(path, "model.normalization_stat_path")
    if axes is None:
        log.info("%s has no principal axes: quantizer_params.whitening_dim takes those of the first batch", path)
        return {}
    channels, count = axes["pca_basis"].shape
    if channels != encoder.channels or count < dim:
        raise ConfigError(
            f"model.normalization_stat_path={path!r} has {count} principal axes of {channels} channels, but "
            f"quantizer_params.whitening_dim={dim} asks for {dim} of {encoder.channels}: write the file with this "
            f"encoder and --components={dim} or more (python -m vqrae_jax.commands.latent_statistics)"
        )
    return jax.device_get(fitted_state(axes["pca_mean"], axes["pca_basis"], axes["pca_var"], dim))


def _read_weights(config: ModelConfig, built: BuiltTokenizer, folder: pathlib.Path | None) -> dict[str, Any]:
    want = variable_shapes(built)["params"]
    read = {}
    if folder is not None:
        read["encoder"] = read_encoder(config, want["encoder"], folder)
    if config.pretrained_decoder_path:
        read["decoder"] = _read_decoder(config, want["decoder"])
    return read


def _read_decoder(config: ModelConfig, want: dict[str, Any]) -> dict[str, Any]:
    path, field = config.pretrained_decoder_path, "model.pretrained_decoder_path"
    state = _decoder_state(sources.read_state_dict(path, field), path)
    if config.scan_layers:
        single = build_tokenizer(config.model_copy(update={"scan_layers": False}), weights=False)
        want = variable_shapes(single)["params"]["decoder"]
    head = want.get("features")  # files of others have none
    tree = convert.convert(state, tables.DECODER_TABLE, {n: p for n, p in want.items() if n != "features"}, source=path)
    if head is not None:
        rng = np.random.default_rng(0)
        tree["features"] = {
            "kernel": rng.normal(0, 0.02, head["kernel"].shape).astype(np.float32),
            "bias": np.zeros(head["bias"].shape, np.float32),
        }
    log.info("decoder weights from %s: %d tensors", path, len(flatten_dict(tree)))
    return stack_blocks(tree) if config.scan_layers else tree


def _decoder_state(state: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """The decoder's state dict out of a release, a training checkpoint of the origin, or an exported folder of ours."""
    ours = {n.removeprefix("params/decoder/"): state[n] for n in state if n.startswith("params/decoder/")}
    if ours:
        tree = unflatten_dict(ours, sep="/")
        tree.pop("features", None)
        return writers.to_state_dict(unstack_blocks(tree) if "blocks" in tree else tree, tables.DECODER_TABLE)
    state = pytorch_vqrae.select_state_dict(state, "ema", path)
    whole = any(name.startswith("decoder.") for name in state)
    return {name.removeprefix("decoder."): state[name] for name in state if name.startswith("decoder.") or not whole}
