"""DiffAug: differentiable augmentation of a discriminator's input (Zhao et al. 2020, arXiv:2006.10738)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

Images = Float[Array, "B H W 3"]
Uniform = Float[Array, " B"]  # one number in [0, 1) per image
SHIFT = 1 / 8  # largest translation, relative to the side


def augment(image: Images, key: PRNGKeyArray, probability: float = 1.0, cutout: float = 0.0) -> Images:
    """Translates, recolours and cuts out parts of a batch; differentiable in the images, determined by `key`.

    Args:
      image: in [0, 1]; grey (0.5) fills the border and the cutout.
      probability: of each of the three operations, for the whole batch.
      cutout: side of the masked square relative to the image's; 0: none.
    """
    gate_key, uniform_key = jax.random.split(key)
    gates = jax.random.uniform(gate_key, (3,)) <= probability
    uniform = jax.random.uniform(uniform_key, (7, len(image)))
    return (apply_augmentations(2 * image - 1, gates, uniform, cutout) + 1) / 2


def apply_augmentations(image: Images, gates: Bool[Array, "3"], uniform: Float[Array, "7 B"], cutout: float) -> Images:
    """Applies the augmentations that random numbers select.

    Args:
      image: in [-1, 1].
      gates: whether to translate, to recolour and to cut out.
      uniform: in [0, 1): shift down and right; brightness, saturation, contrast; row and column of the cutout.
      cutout: see `augment`.
    """
    image = jnp.where(gates[0], translate(image, uniform[0], uniform[1]), image)
    image = jnp.where(gates[1], recolour(image, *uniform[2:5]), image)
    return jnp.where(gates[2], cut_out(image, uniform[5], uniform[6], cutout), image) if cutout else image


def translate(image: Images, down: Uniform, right: Uniform) -> Images:
    """Shifts images by whole pixels; zeros fill the border."""
    for axis, uniform in ((1, down), (2, right)):
        side = image.shape[axis]
        reach = round(side * SHIFT)
        shift = jnp.floor(uniform * (2 * reach + 1)).astype(jnp.int32) - reach
        source = jnp.arange(side) + shift[:, None]
        shape = [1, 1, 1, 1]
        shape[0], shape[axis] = source.shape
        inside = ((source >= 0) & (source < side)).reshape(shape)
        image = jnp.where(inside, jnp.take_along_axis(image, source.clip(0, side - 1).reshape(shape), axis), 0)
    return image


def recolour(image: Images, brightness: Uniform, saturation: Uniform, contrast: Uniform) -> Images:
    """Adds up to 0.5 either way, then scales around grey (0 to 2) and around the mean (0.5 to 1.5)."""
    brightness, saturation, contrast = (x[:, None, None, None] for x in (brightness, saturation, contrast))
    image = image + (brightness - 0.5)
    grey = image.mean(-1, keepdims=True)
    image = (image - grey) * (2 * saturation) + grey
    mean = image.mean((1, 2, 3), keepdims=True)
    return (image - mean) * (contrast + 0.5) + mean


def cut_out(image: Images, row: Uniform, column: Uniform, share: float) -> Images:
    """Zeroes a rectangle of `share` of the sides, which may lie partly outside."""
    cut = jnp.ones((1, 1, 1, 1), bool)
    for axis, uniform in ((1, row), (2, column)):
        side = image.shape[axis]
        size = round(side * share)
        centre = jnp.floor(uniform * (side + 1 - size % 2)).astype(jnp.int32)[:, None]
        first, position = centre - size // 2, jnp.arange(side)
        # Positions beyond the border count as the border's row or column.
        first, last = first.clip(0, side - 1), (first + size - 1).clip(0, side - 1)
        shape = [1, 1, 1, 1]
        shape[0], shape[axis] = len(image), side
        cut = cut & ((position >= first) & (position <= last)).reshape(shape)
    return jnp.where(cut, 0, image)
