"""Frozen networks that judge images, from a config: perceptual networks, discriminators, networks of the metrics."""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from vqrae_jax.build.encoder import activation_spread, build_encoder
from vqrae_jax.config import AdversaryConfig, EvaluationConfig, Metric, ModelConfig, PerceptualConfig, from_dict
from vqrae_jax.errors import ConfigError, WeightsError
from vqrae_jax.models.convnext import ConvNeXtConfig
from vqrae_jax.models.discriminator import DinoDiscriminator, PatchDiscriminator
from vqrae_jax.models.encoder import PooledEncoder
from vqrae_jax.models.inception import SIDE, Inception
from vqrae_jax.models.lpips import LPIPS
from vqrae_jax.models.perceptual import EncoderDistance, LogitDistance
from vqrae_jax.models.stacking import stack_blocks, unstack_blocks
from vqrae_jax.models.vit import BlocksConfig, ViTConfig
from vqrae_jax.pretrained import writers
from vqrae_jax.pretrained.judge_weights import (
    INCEPTION_URL,
    convert_convnext,
    convert_dino,
    read_convnext,
    read_dino,
    read_inception,
    read_lpips,
)
from vqrae_jax.pretrained.released import DINO


@dataclasses.dataclass(frozen=True)
class FrozenNetwork:
    """A network and what of its parameters never trains."""

    module: nn.Module
    params: dict[str, Any]  # numpy, float32


def build_perceptual(config: PerceptualConfig, mesh: Mesh | None = None, weights: bool = True) -> FrozenNetwork:
    """The distance of two batches of pictures in [0, 1] -> [B]; with weights=False its params are shapes.

    `mesh` is that on which it will run, if on one.

    Raises:
      WeightsError, ConfigError: its weights cannot be had, with the field that named them.
    """
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    with _or_switch_off("loss.perceptual", "loss.perceptual.weight=0"):
        if config.network == "lpips":
            module = LPIPS(config.dtype)
            target = jax.eval_shape(module.init, jax.random.key(0), image, image)["params"]
            return FrozenNetwork(module, read_lpips(target, config.trunk, config.heads) if weights else target)
        if config.network == "convnext":
            if config.path is None:
                raise ConfigError("path is None: name a ConvNeXt classifier, as in facebook/convnext-small-224")
            fields, tensors = read_convnext(config.path, "loss.perceptual.path")
            module = LogitDistance(ConvNeXtConfig(**fields, dtype=config.dtype), config.input_size)
            target = jax.eval_shape(module.init, jax.random.key(0), image, image)["params"]["classifier"]
            return FrozenNetwork(
                module, {"classifier": convert_convnext(tensors, target, config.path) if weights else target}
            )
        model = ModelConfig(
            encoder_cls=config.encoder_cls,
            encoder_config_path=config.path,
            encoder_input_size=config.input_size,
            encoder_params={"layers": config.layers, "fusion": "concat", "architecture": config.architecture},
            dtype=config.dtype,
        )
        encoder, params = build_encoder(model, mesh)
        module = EncoderDistance(encoder)
        if not weights:
            return FrozenNetwork(module, jax.eval_shape(module.init, jax.random.key(0), image, image)["params"])
        if params is None:
            drawn = jax.jit(module.init)(jax.random.key(0), jnp.zeros(image.shape), jnp.zeros(image.shape))
            return FrozenNetwork(module, jax.device_get(drawn["params"]))
        return FrozenNetwork(module, {"encoder": params})


def build_discriminator(
    config: AdversaryConfig,
    mesh: Mesh | None = None,
    weights: bool = True,
    scan: bool = False,
    attention: Literal["xla", "cudnn", "pallas"] = "xla",
) -> FrozenNetwork:
    """Pictures in [0, 1] -> logits; `params` is {"trunk": ...} of the DINO discriminator, empty for PatchGAN.

    With weights=False they are shapes, and a trunk that was released is not looked for; with `scan` its blocks are
    stacked. `attention` is that of the model; NVIDIA's kernel wants bfloat16 here as well.

    Raises:
      WeightsError, ConfigError: the trunk cannot be had, with the field that named it.
    """
    if config.discriminator == "patch":
        module = PatchDiscriminator(
            config.width, config.layers, config.norm, spectral=config.spectral, dtype=config.dtype
        )
        return FrozenNetwork(module, {})
    with _or_switch_off("adversary", "adversary.discriminator=none"):
        if not weights and config.path in DINO:
            fields = {**DINO[config.path], "blocks": dict(DINO[config.path]["blocks"])}
        else:
            fields, tensors = read_dino(config.path, "adversary.path", config.trunk_heads)
        attention = attention if config.dtype == "bfloat16" else "xla"
        blocks = BlocksConfig(
            **fields.pop("blocks"), dtype=config.dtype, scan=scan, attention=attention,
            spread=activation_spread(mesh),
        )  # fmt: skip
        if any(tap >= blocks.depth for tap in config.taps):
            raise ConfigError(f"adversary.taps={config.taps}: the trunk has blocks 0 to {blocks.depth - 1}")
        module = DinoDiscriminator(
            ViTConfig(blocks, **fields), config.taps, config.window, config.norm, spectral=config.spectral
        )
        image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
        target = jax.eval_shape(module.init, jax.random.key(0), image)["params"]["trunk"]
        if not weights:
            return FrozenNetwork(module, {"trunk": target})
        trunk = convert_dino(tensors, jax.eval_shape(unstack_blocks, target) if scan else target, config.path)
        return FrozenNetwork(module, {"trunk": stack_blocks(trunk) if scan else trunk})


@contextlib.contextmanager
def _or_switch_off(section: str, line: str) -> Iterator[None]:
    """Adds to an error for what its network is wanted, and how to do without it."""
    try:
        yield
    except (WeightsError, ConfigError) as error:
        raise type(error)(f"{section}: {error}\nwithout this term: --config.{line}") from error


FEATURES = ("inception", "encoder")  # those that give one vector per picture

Images = Float[Array, "B H W 3"]


@dataclasses.dataclass(frozen=True)
class MetricNetworks:
    """Modules without state, and apart from them what they are applied to."""

    modules: dict[str, nn.Module]
    params: dict[str, Any]  # by the same names, float32 numpy
    protocol: dict[str, dict[str, Any]]  # what each is and sees, for the record

    def compare(self, params: Any, reconstruction: Images, image: Images) -> dict[str, jax.Array]:
        """LPIPS [B], features [B, D] and Inception's class scores [B, 1008] by name; pure.

        Args:
          params: `self.params`, wherever they live.
          reconstruction: as painted; it is rounded to bytes, as a picture that was saved.
          image: in [0, 1].
        """
        reconstruction, rows = to_bytes(reconstruction), {}
        if "lpips" in self.modules:
            rows["lpips"] = self.modules["lpips"].apply({"params": params["lpips"]}, reconstruction, image)
        ours, theirs = (self.features(params, x) for x in (reconstruction, image))
        rows |= {f"{name}/reconstruction": x for name, x in ours.items()}
        return rows | {f"{name}/image": x for name, x in theirs.items() if name != "scores"}

    def features(self, params: Any, image: Images) -> dict[str, jax.Array]:
        """Features [B, D] by the network's name, and `scores` [B, 1008] of Inception's classes; pure."""
        rows = {}
        for name in FEATURES:
            if name in self.modules:
                rows[name] = self.modules[name].apply({"params": params[name]}, image)
        if "inception" in rows:
            rows["inception"], rows["scores"] = rows["inception"]
        return rows


def to_bytes(image: Images) -> Images:
    """Clipped and rounded to multiples of 1 / 255."""
    return jnp.round(jnp.clip(image, 0, 1) * 255) / 255


def load_metric_networks(
    config: EvaluationConfig,
    figures: Collection[Metric],
    perceptual: PerceptualConfig = PerceptualConfig(),  # noqa: B008 (it is frozen)
) -> MetricNetworks:
    """Reads the networks that `figures` need; `perceptual` names the files of LPIPS.

    Raises:
      ConfigError, WeightsError: which file is missing, and how to do without the figure.
    """
    readers = {
        "lpips": lambda: _lpips(perceptual),
        "inception": lambda: _inception(config),
        "encoder": lambda: _encoder(config),
    }
    modules, params, protocol = {}, {}, {}
    for name, read in readers.items():
        if name in figures:
            try:
                modules[name], params[name], told = read()
            except (ConfigError, WeightsError) as error:
                raise type(error)(f"{error}\n  To do without it, leave {name!r} out of evaluation.metrics") from None
            protocol[name] = told | {"sha256": writers.content_hash(params[name])}
    return MetricNetworks(modules, params, protocol)


def feature_width(networks: MetricNetworks, name: str) -> int:
    """D of the network's features."""
    features = _shape(lambda image: networks.features(networks.params, image), 64)
    return features[name].shape[-1]


def _lpips(config: PerceptualConfig) -> tuple[nn.Module, Any, dict[str, Any]]:
    module = LPIPS()
    target = _shape(lambda image: module.init(jax.random.key(0), image, image), 32)["params"]
    params = read_lpips(target, config.trunk, config.heads)
    return module, params, {"network": "VGG16, LPIPS v0.1", "trunk": config.trunk, "heads": config.heads}


def _inception(config: EvaluationConfig) -> tuple[nn.Module, Any, dict[str, Any]]:
    field = "evaluation.inception_path"
    if config.inception_path is None:
        raise ConfigError(f"{field} is None: download {INCEPTION_URL} and give its path")
    module = Inception()
    target = _shape(lambda image: module.init(jax.random.key(0), image), SIDE)["params"]
    params = read_inception(target, config.inception_path, field)
    resized = f"TensorFlow 1 bilinear to {SIDE}, no antialias"
    return module, params, {"network": "Inception-v3 of 2015-12-05", "path": config.inception_path, "resize": resized}


def _encoder(config: EvaluationConfig) -> tuple[nn.Module, Any, dict[str, Any]]:
    fields = {"encoder_cls": "encoder_cls", "encoder_path": "encoder_config_path"}
    fields["encoder_input_size"] = "encoder_input_size"
    values = {theirs: getattr(config, ours) for ours, theirs in fields.items()}
    try:
        encoder, params = build_encoder(from_dict(ModelConfig, values | {"encoder_params": {"normalize": False}}))
    except (ConfigError, WeightsError) as error:
        told = str(error)
        for ours, theirs in fields.items():
            told = told.replace(f"model.{theirs}", f"evaluation.{ours}")
        raise type(error)(told) from None
    if config.encoder_pool == "cls" and not encoder.vit.cls:
        raise ConfigError(f"evaluation.encoder_pool='cls': {config.encoder_path} has no class token; take 'mean'")
    module = PooledEncoder(encoder.vit, config.encoder_input_size, encoder.mean, encoder.std, config.encoder_pool)
    protocol = {
        "network": config.encoder_cls,
        "path": config.encoder_path,
        "resize": f"bicubic with antialias to {config.encoder_input_size}",
        "pool": config.encoder_pool,
    }
    return module, params, protocol


def _shape(function: Callable[[jax.Array], Any], size: int) -> Any:
    return jax.eval_shape(function, jax.ShapeDtypeStruct((1, size, size, 3), np.float32))
