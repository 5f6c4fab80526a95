"""The tokenizer's loss without the adversarial term: its terms, their weights, and the frozen networks they need."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vqrae_jax.build import judges
from vqrae_jax.config import Config
from vqrae_jax.losses.reconstruction import PIXEL, feature_distance
from vqrae_jax.models.encoder import Encoder
from vqrae_jax.models.vqrae import VQRAE


@flax.struct.dataclass
class LossInputs:
    """The outputs of the model that the terms are functions of."""

    reconstruction: Any  # float [B, H, W, 3]
    vq_loss: Any  # float []
    encoded: Any  # float [B, h, w, C]
    features: Any  # float [B, g, g, F], or None


@dataclasses.dataclass(frozen=True)
class Objective:
    """The terms of a config; a term of weight 0 is not computed, and its network is not read."""

    config: Config
    encoder: Encoder
    perceptual: judges.FrozenNetwork | None

    @classmethod
    def build(cls, config: Config, module: VQRAE, mesh: Mesh, weights: bool = True) -> "Objective":
        """Reads the weights of the perceptual network if it is used; with weights=False only their shapes.

        Raises:
          WeightsError, ConfigError: the weights are not available.
        """
        perceptual = config.loss.perceptual
        network = judges.build_perceptual(perceptual, mesh, weights) if perceptual.weight else None
        return cls(config, module.encoder, network)

    @property
    def needs_teacher(self) -> bool:
        """True if a term compares with the pretrained encoder, of which the model's encoder may be a trained copy."""
        return bool(self.config.loss.feature_weight or self.config.loss.distill_weight)

    def frozen(self) -> dict[str, Any]:
        """Returns the parameters of the networks that only the objective uses."""
        return {"perceptual": self.perceptual.params} if self.perceptual else {}

    def terms(
        self, outputs: LossInputs, frozen: Any, image: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the weighted sum of the terms, and every term by name, for images [B, H, W, 3] in [0, 1]."""
        loss = self.config.loss
        weights = {"pixel": loss.pixel_weight, "vq": loss.vq_weight}
        values = {"pixel": PIXEL[loss.pixel](outputs.reconstruction, image), "vq": outputs.vq_loss}
        if self.perceptual:
            params = {"params": frozen["perceptual"]}
            weights["perceptual"] = loss.perceptual.weight
            values["perceptual"] = run_from(
                loss.perceptual.start_steps, step,
                lambda: self.perceptual.module.apply(params, outputs.reconstruction, image).mean(), jnp.zeros(()),
            )  # fmt: skip
        if loss.feature_weight:
            layers = self.config.model.decoder_features
            target = self._target(frozen, image, self.encoder.clone(layers=layers, fusion="concat", normalize=True))
            weights["features"] = loss.feature_weight
            values["features"] = feature_distance(loss.feature_distance, outputs.features, target, len(layers))
        if loss.distill_weight:
            weights["distill"] = loss.distill_weight
            target = self._target(frozen, image, self.encoder)
            values["distill"] = feature_distance(loss.distill_distance, outputs.encoded, target, 1)
        return sum(weights[n] * values[n] for n in weights), values

    def _target(self, frozen: Any, image: jax.Array, encoder: Encoder) -> jax.Array:
        params = frozen["teacher"] if "teacher" in frozen else frozen["encoder"]
        return jax.lax.stop_gradient(encoder.apply({"params": params}, image))


def run_from(start: int, step: jax.Array, function: Callable[[], Any], otherwise: Any) -> Any:
    """Returns `function()` from step `start` on and `otherwise` before, without computing the function."""
    return function() if start == 0 else jax.lax.cond(step >= start, function, lambda: otherwise)
