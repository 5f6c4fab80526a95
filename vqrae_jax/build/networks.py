"""The networks by whose eyes pictures are compared: LPIPS, Inception-v3, and any encoder of ours."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vqrae_jax.build import tokenizer as assembly
from vqrae_jax.config import EvaluationConfig, Figure, ModelConfig, PerceptualConfig, from_dict
from vqrae_jax.models.encoder import PooledEncoder
from vqrae_jax.models.inception import SIDE, Inception
from vqrae_jax.models.lpips import LPIPS
from vqrae_jax.pretrained import export
from vqrae_jax.pretrained.inception import WHERE, read_inception
from vqrae_jax.pretrained.lpips import read_lpips
from vqrae_jax.errors import ConfigError, WeightsError

FEATURES = ("inception", "encoder")  # those that give one vector per picture

Images = Float[Array, "B H W 3"]


@dataclasses.dataclass(frozen=True)
class Networks:
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


def load(
    config: EvaluationConfig,
    figures: Collection[Figure],
    perceptual: PerceptualConfig = PerceptualConfig(),  # noqa: B008 (it is frozen)
) -> Networks:
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
            protocol[name] = told | {"sha256": export.content_hash(params[name])}
    return Networks(modules, params, protocol)


def feature_width(networks: Networks, name: str) -> int:
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
        raise ConfigError(f"{field} is None: download {WHERE} and give its path")
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
        encoder, params = assembly.encoder_alone(
            from_dict(ModelConfig, values | {"encoder_params": {"normalize": False}})
        )
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
