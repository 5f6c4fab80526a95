"""DiffAug: differentiable augmentation of what a discriminator sees (Zhao et al. 2020, arXiv:2006.10738)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

Images = Float[Array, "B H W 3"]
Draw = Float[Array, " B"]  # one number in [0, 1) per picture
SHIFT = 1 / 8  # largest translation, relative to the side


def augment(image: Images, key: PRNGKeyArray, probability: float = 1.0, cutout: float = 0.0) -> Images:
    """Shifts, recolours and masks a batch; differentiable in the pictures, fully determined by `key`.

    Args:
      image: in [0, 1]; grey (0.5) comes in from beyond the border and fills what is cut out.
      probability: of each of the three, for the whole batch.
      cutout: side of the masked square relative to the picture's; 0: none.
    """
    gate_key, draw_key = jax.random.split(key)
    gates = jax.random.uniform(gate_key, (3,)) <= probability
    draws = jax.random.uniform(draw_key, (7, len(image)))
    return (apply_augmentations(2 * image - 1, gates, draws, cutout) + 1) / 2


def apply_augmentations(
    image: Images,
    gates: jax.Array,
    draws: jax.Array,
    cutout: float,
) -> Images:
    """What `augment` does once chance has decided.

    Args:
      image: in [-1, 1].
      gates: [3], whether to translate, colour and cut out.
      draws: [7, B] in [0, 1): shift down and right; brightness, saturation, contrast; row and column of the cutout.
      cutout: as in `augment`.
    """
    image = jnp.where(gates[0], translate(image, draws[0], draws[1]), image)
    image = jnp.where(gates[1], recolour(image, *draws[2:5]), image)
    return jnp.where(gates[2], cut_out(image, draws[5], draws[6], cutout), image) if cutout else image


def translate(image: Images, down: Draw, right: Draw) -> Images:
    """Shows picture position p + shift at p, whole pixels; zeros beyond the border."""
    for axis, draw in ((1, down), (2, right)):
        side = image.shape[axis]
        reach = round(side * SHIFT)
        shift = jnp.floor(draw * (2 * reach + 1)).astype(jnp.int32) - reach
        at = jnp.arange(side) + shift[:, None]
        shape = [1, 1, 1, 1]
        shape[0], shape[axis] = at.shape
        inside = ((at >= 0) & (at < side)).reshape(shape)
        image = jnp.where(inside, jnp.take_along_axis(image, at.clip(0, side - 1).reshape(shape), axis), 0)
    return image


def recolour(
    image: Images,
    brightness: Draw,
    saturation: Draw,
    contrast: Draw,
) -> Images:
    """Adds up to a half either way, then scales around grey (0 to 2) and around the mean (0.5 to 1.5)."""
    brightness, saturation, contrast = (x[:, None, None, None] for x in (brightness, saturation, contrast))
    image = image + (brightness - 0.5)
    grey = image.mean(-1, keepdims=True)
    image = (image - grey) * (2 * saturation) + grey
    mean = image.mean((1, 2, 3), keepdims=True)
    return (image - mean) * (contrast + 0.5) + mean


def cut_out(image: Images, row: Draw, column: Draw, share: float) -> Images:
    """Zeros in a rectangle of `share` of the sides, which may lie partly outside."""
    cut = jnp.ones((1, 1, 1, 1), bool)
    for axis, draw in ((1, row), (2, column)):
        side = image.shape[axis]
        size = round(side * share)
        centre = jnp.floor(draw * (side + 1 - size % 2)).astype(jnp.int32)[:, None]
        first, at = centre - size // 2, jnp.arange(side)
        # Positions beyond the border count as the border's own row or column.
        first, last = first.clip(0, side - 1), (first + size - 1).clip(0, side - 1)
        shape = [1, 1, 1, 1]
        shape[0], shape[axis] = len(image), side
        cut = cut & ((at >= first) & (at <= last)).reshape(shape)
    return jnp.where(cut, 0, image)
