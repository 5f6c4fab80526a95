"""Builds the frozen networks that judge images: perceptual distances, discriminators, networks of the metrics."""

import contextlib
import dataclasses
from collections.abc import Collection, Iterator
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from vqrae_jax.build.encoder import activation_sharding, build_encoder, check_layers, describe_encoder
from vqrae_jax.config import AdversaryConfig, EvaluationConfig, Metric, ModelConfig, PerceptualConfig
from vqrae_jax.errors import ConfigError, WeightsError
from vqrae_jax.models.discriminator import DinoDiscriminator, PatchDiscriminator
from vqrae_jax.models.encoder import PooledEncoder
from vqrae_jax.models.inception import SIDE, Inception
from vqrae_jax.models.perceptual import LPIPS, EncoderDistance
from vqrae_jax.models.vit import BlocksConfig, ViTConfig
from vqrae_jax.pretrained import writers
from vqrae_jax.pretrained.judge_weights import INCEPTION_URL, convert_dino, read_dino, read_inception, read_lpips
from vqrae_jax.pretrained.released import DINO

FEATURES = ("inception", "encoder")  # metric networks that return one vector per image

Images = Float[Array, "B H W 3"]


@dataclasses.dataclass(frozen=True)
class FrozenNetwork:
    """A module, the part of its parameters that never trains, and a description for reports."""

    module: nn.Module
    params: dict[str, Any]  # float32 numpy arrays
    description: dict[str, Any] = dataclasses.field(default_factory=dict)


def build_perceptual(config: PerceptualConfig, mesh: Mesh | None = None, weights: bool = True) -> FrozenNetwork:
    """Builds the distance between two batches of images in [0, 1], which returns [B].

    It will run on `mesh`; with weights=False `params` are shapes.
    """
    with _in_section("loss.perceptual", encoder_config_path="path", encoder_input_size="input_size"):
        if config.network == "lpips":
            return _build_lpips(config, config.dtype, weights)
        model = ModelConfig(
            encoder_cls=config.encoder_cls, encoder_config_path=config.path, encoder_input_size=config.input_size,
            encoder_params={"layers": config.layers, "fusion": "concat", "architecture": config.architecture},
            dtype=config.dtype,
        )  # fmt: skip
        encoder, params = build_encoder(model, mesh) if weights else (describe_encoder(model, mesh)[0], None)
        module = EncoderDistance(encoder)
        if params is not None:
            return FrozenNetwork(module, {"encoder": params})
        if not weights:
            return FrozenNetwork(module, _param_shapes(module, 2))
        image = jnp.zeros((1, 32, 32, 3))
        return FrozenNetwork(module, jax.device_get(jax.jit(module.init)(jax.random.key(0), image, image)["params"]))


def build_discriminator(
    config: AdversaryConfig, mesh: Mesh | None = None, weights: bool = True, attention: Literal["xla", "cudnn"] = "xla"
) -> FrozenNetwork:
    """Builds the network from images in [0, 1] to logits; `params` is {"trunk": ...}, or empty for PatchGAN.

    It will run on `mesh`; with weights=False `params` are shapes, and the files of a released trunk are not read.
    `attention` is that of the model; NVIDIA's kernel needs bfloat16 here as well.
    """
    if config.discriminator == "patch":
        c = config
        return FrozenNetwork(PatchDiscriminator(c.width, c.layers, c.norm, spectral=c.spectral, dtype=c.dtype), {})
    with _in_section("adversary"):
        if not weights and config.path in DINO:
            fields, tensors = DINO[config.path], {}
        else:
            fields, tensors = read_dino(config.path, "adversary.path", config.trunk_heads)
        blocks = BlocksConfig(
            **fields["blocks"], dtype=config.dtype, attention=attention if config.dtype == "bfloat16" else "xla",
            shard_activations=activation_sharding(mesh),
        )  # fmt: skip
        check_layers("adversary.taps", config.taps, blocks)
        trunk = ViTConfig(**{**fields, "blocks": blocks})
        module = DinoDiscriminator(trunk, config.taps, config.window, config.norm, spectral=config.spectral)
        shapes = _param_shapes(module)["trunk"]
        return FrozenNetwork(module, {"trunk": convert_dino(tensors, shapes, config.path) if weights else shapes})


@dataclasses.dataclass(frozen=True)
class MetricNetworks:
    """The networks of the metrics, by name ("lpips", "inception", "encoder")."""

    modules: dict[str, nn.Module]
    params: dict[str, Any]  # float32 numpy arrays
    protocol: dict[str, dict[str, Any]]  # what each network is and how it resizes images, for reports
    spatial: bool = False  # return Inception's spatial features as well

    def compare(self, params: Any, reconstruction: Images, image: Images) -> dict[str, jax.Array]:
        """Returns LPIPS [B], features [B, D] and Inception's class scores [B, 1008] by name; see `features`.

        `params` are `self.params`, on any devices. Reconstructions are rounded to bytes, like saved images.
        """
        reconstruction, results = to_bytes(reconstruction), {}
        if "lpips" in self.modules:
            results["lpips"] = self.modules["lpips"].apply({"params": params["lpips"]}, reconstruction, image)
        results |= {f"{name}/reconstruction": x for name, x in self.features(params, reconstruction).items()}
        results |= {f"{name}/image": x for name, x in self.features(params, image).items() if name != "scores"}
        return results

    def features(self, params: Any, image: Images) -> dict[str, jax.Array]:
        """Returns features [B, D] by network, Inception's class `scores` [B, 1008], and `spatial` if `self.spatial`."""
        names = [name for name in FEATURES if name in self.modules]
        results = {name: self.modules[name].apply({"params": params[name]}, image) for name in names}
        if "inception" in results:
            results["inception"], results["scores"], spatial = results["inception"]
            results |= {"spatial": spatial} if self.spatial else {}
        return results

    def widths(self) -> dict[str, int]:
        """Returns the number of features D by the names in `features`, without the scores."""
        image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        shapes = jax.eval_shape(self.features, self.params, image)
        return {name: x.shape[-1] for name, x in shapes.items() if name != "scores"}


def to_bytes(image: Images) -> Images:
    """Clips images to [0, 1] and rounds them to multiples of 1 / 255."""
    return jnp.round(jnp.clip(image, 0, 1) * 255) / 255


def load_metric_networks(
    config: EvaluationConfig,
    metrics: Collection[Metric],
    perceptual: PerceptualConfig = PerceptualConfig(),  # noqa: B008 (it is frozen)
) -> MetricNetworks:
    """Loads the networks that the metrics need; `perceptual` names the files of LPIPS."""
    builders = {
        "lpips": lambda: _build_lpips(perceptual),
        "inception": lambda: _build_inception(config),
        "encoder": lambda: _build_pooled_encoder(config),
    }
    modules, params, protocol = {}, {}, {}
    for name in (name for name in builders if name in metrics):
        with _in_section("evaluation", encoder_config_path="encoder_path"):
            network = builders[name]()
        modules[name], params[name] = network.module, network.params
        protocol[name] = network.description | {"sha256": writers.content_hash(network.params)}
    return MetricNetworks(modules, params, protocol, spatial="sfid" in metrics)


def _build_lpips(config: PerceptualConfig, dtype: str = "float32", weights: bool = True) -> FrozenNetwork:
    module = LPIPS(dtype)
    shapes = _param_shapes(module, 2)
    params = read_lpips(shapes, config.trunk, config.heads) if weights else shapes
    return FrozenNetwork(module, params, {"network": "VGG16, LPIPS v0.1", "trunk": config.trunk, "heads": config.heads})


def _build_inception(config: EvaluationConfig) -> FrozenNetwork:
    module, path, field = Inception(), config.inception_path, "evaluation.inception_path"
    if path is None:
        raise ConfigError(f"must be the path of {INCEPTION_URL}", field=field, value=None)
    resized = f"TensorFlow 1 bilinear to {SIDE}, no antialias"
    description = {"network": "Inception-v3 of 2015-12-05", "path": path, "resize": resized}
    return FrozenNetwork(module, read_inception(_param_shapes(module), path, field), description)


def _build_pooled_encoder(config: EvaluationConfig) -> FrozenNetwork:
    path, size, pool = config.encoder_path, config.encoder_input_size, config.encoder_pool
    model = {"encoder_cls": config.encoder_cls, "encoder_config_path": path, "encoder_input_size": size}
    encoder, params = build_encoder(ModelConfig(**model, encoder_params={"normalize": False}))
    if pool == "cls" and not encoder.vit.cls:
        raise ConfigError(f"{path} has no class token; use 'mean'", field="evaluation.encoder_pool", value=pool)
    module = PooledEncoder(encoder.vit, size, encoder.mean, encoder.std, pool)
    resized = f"bicubic with antialias to {size}"
    return FrozenNetwork(module, params, {"network": config.encoder_cls, "path": path, "resize": resized, "pool": pool})


def _param_shapes(module: nn.Module, images: int = 1) -> Any:
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), *[image] * images)["params"]


@contextlib.contextmanager
def _in_section(section: str, **names: str) -> Iterator[None]:
    """Replaces fields of the model section in errors by those of `section`, renamed by `names`."""
    try:
        yield
    except (WeightsError, ConfigError) as error:
        if (field := error.field) and field.startswith("model."):
            name = field.removeprefix("model.").removeprefix("encoder_params.")
            field = f"{section}.{names.get(name, name)}"
        raise type(error)(error.message, field=field, value=error.value) from error
