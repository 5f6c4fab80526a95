"""The tokenizer's loss but for its adversary: terms, their weights, and the frozen networks they ask."""

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
class Painted:
    """What the losses of one pass are functions of."""

    reconstruction: Any  # Float [B, H, W, 3]
    vq_loss: Any  # Float []
    encoded: Any  # Float [B, h, w, C]
    features: Any  # Float [B, g, g, F], or None


@dataclasses.dataclass(frozen=True)
class Objective:
    """Which terms there are; a term of weight 0 is not computed, and what it would ask is not read."""

    config: Config
    encoder: Encoder
    perceptual: judges.FrozenNetwork | None

    @classmethod
    def build(cls, config: Config, module: VQRAE, mesh: Mesh, weights: bool = True) -> "Objective":
        """Reads the weights of the perceptual network, if it has a weight; with weights=False only their shapes.

        Raises:
          WeightsError, ConfigError: they cannot be had.
        """
        wanted = config.loss.perceptual
        return cls(config, module.encoder, judges.build_perceptual(wanted, mesh, weights) if wanted.weight else None)

    @property
    def needs_teacher(self) -> bool:
        """Whether the pretrained encoder is asked, which may be another than the one that trains."""
        return bool(self.config.loss.feature_weight or self.config.loss.distill_weight)

    def frozen(self) -> dict[str, Any]:
        """Parameters of networks that belong to the objective alone."""
        return {"perceptual": self.perceptual.params} if self.perceptual else {}

    def terms(
        self, painted: Painted, frozen: Any, image: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The weighted sum, and every term by itself.

        Args:
          frozen: `encoder` or `teacher`, `perceptual`.
          image: [B, H, W, 3] in [0, 1].
          step: perceptual terms wait for theirs.
        """
        given = self.config.loss
        weights = {"pixel": given.pixel_weight, "vq": given.vq_weight}
        values = {"pixel": PIXEL[given.pixel](painted.reconstruction, image), "vq": painted.vq_loss}
        if self.perceptual:
            weights["perceptual"] = given.perceptual.weight
            values["perceptual"] = after(
                given.perceptual.start_steps, step,
                lambda: self._perceptual(frozen["perceptual"], painted.reconstruction, image), jnp.zeros(()),
            )  # fmt: skip
        if given.feature_weight:
            layers = self.config.model.decoder_features
            target = self._teach(frozen, image, self.encoder.clone(layers=layers, fusion="concat", normalize=True))
            weights["features"] = given.feature_weight
            values["features"] = feature_distance(given.feature_distance, painted.features, target, len(layers))
        if given.distill_weight:
            weights["distill"] = given.distill_weight
            target = self._teach(frozen, image, self.encoder)
            values["distill"] = feature_distance(given.distill_distance, painted.encoded, target, 1)
        return sum(weights[n] * values[n] for n in weights), values

    def _perceptual(self, params: Any, reconstruction: jax.Array, image: jax.Array) -> jax.Array:
        return self.perceptual.module.apply({"params": params}, reconstruction, image).mean()

    def _teach(self, frozen: Any, image: jax.Array, encoder: Encoder) -> jax.Array:
        params = frozen["teacher"] if "teacher" in frozen else frozen["encoder"]
        return jax.lax.stop_gradient(encoder.apply({"params": params}, image))


def after(start: int, step: jax.Array, run: Callable[[], Any], otherwise: Any) -> Any:
    """`run()` from step `start` on, `otherwise` before; what is not run costs nothing."""
    return run() if start == 0 else jax.lax.cond(step >= start, run, lambda: otherwise)
