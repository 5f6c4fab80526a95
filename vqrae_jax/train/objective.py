"""The tokenizer's loss without the adversarial term: its terms, their weights, and the frozen networks they need."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from vqrae_jax.build import judges
from vqrae_jax.config import Config
from vqrae_jax.losses.reconstruction import PIXEL, feature_distance, gradient_difference
from vqrae_jax.models.encoder import Encoder


@flax.struct.dataclass
class LossInputs:
    """The outputs of the model that the terms are functions of."""

    reconstruction: Any  # float [B, H, W, 3]
    vq_loss: Any  # float []
    encoded: Any  # float [B, h, w, C]
    features: Any  # float [B, g, g, F], or None
    target: Any = None  # float [B, g, g, F] for the features; None: that of the teacher


@dataclasses.dataclass(frozen=True)
class Objective:
    """The terms of a config; a term of weight 0 is not computed, and does not need its network."""

    config: Config
    encoder: Encoder
    perceptual: judges.FrozenNetwork | None  # None: its weight is 0

    def targets(self, frozen: Any) -> tuple[int, ...]:
        """Returns the blocks whose features the encoder returns with its latents: none if there is a teacher."""
        shares = self.config.loss.feature_weight and "teacher" not in frozen
        return self.config.model.decoder_features if shares else ()

    def terms(
        self, outputs: LossInputs, frozen: Any, image: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the weighted sum of the terms, and every term by name, for images [B, H, W, 3] in [0, 1]."""
        loss = self.config.loss
        pixel = PIXEL[loss.pixel](outputs.reconstruction, image)
        terms = {"pixel": (loss.pixel_weight, pixel), "vq": (loss.vq_weight, outputs.vq_loss)}
        if loss.gradient_weight:
            terms["gradient"] = (loss.gradient_weight, gradient_difference(outputs.reconstruction, image))
        if self.perceptual:
            gram_weight = loss.perceptual.gram_weight
            weights = {"perceptual": loss.perceptual.weight} | ({"gram": gram_weight} if gram_weight else {})

            def distances() -> list[jax.Array]:
                images = outputs.reconstruction, image
                values = self.perceptual.module.apply({"params": frozen["perceptual"]}, *images, "gram" in weights)
                return [value.mean() for value in (values if "gram" in weights else (values,))]

            values = run_from(loss.perceptual.start_steps, step, distances, [jnp.zeros(())] * len(weights))
            terms |= {name: (weight, value) for (name, weight), value in zip(weights.items(), values, strict=True)}
        if loss.feature_weight:
            layers, target = self.config.model.decoder_features, jax.lax.stop_gradient(outputs.target)
            if target is None:
                target = self._target(frozen, image, self.encoder.clone(layers=layers, fusion="concat", normalize=True))
            value = feature_distance(loss.feature_distance, outputs.features, target, len(layers))
            terms["features"] = (loss.feature_weight, value)
        if loss.distill_weight:
            target = self._target(frozen, image, self.encoder)
            value = feature_distance(loss.distill_distance, outputs.encoded, target, 1)
            terms["distill"] = (loss.distill_weight, value)
        return sum(weight * value for weight, value in terms.values()), {n: value for n, (_, value) in terms.items()}

    def _target(self, frozen: Any, image: jax.Array, encoder: Encoder) -> jax.Array:
        params = frozen["teacher"] if "teacher" in frozen else frozen["encoder"]
        return jax.lax.stop_gradient(encoder.apply({"params": params}, image))


def run_from(start: int, step: jax.Array, function: Callable[[], Any], otherwise: Any) -> Any:
    """Returns `function()` from step `start` on and `otherwise` before, without computing the function."""
    return function() if start == 0 else jax.lax.cond(step >= start, function, lambda: otherwise)
