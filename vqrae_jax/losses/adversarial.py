"""Losses of generator and discriminator, their regularization, and the weight that balances the generator's loss.

Logits are [B, M]; positive ones classify an image as real.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Logits = Float[Array, "B M"]
Scalar = Float[Array, ""]


def hinge_discriminator(real: Logits, fake: Logits) -> Scalar:
    """Returns half of the margin violations (Lim & Ye 2017, arXiv:1705.02894)."""
    return 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())


def vanilla_discriminator(real: Logits, fake: Logits) -> Scalar:
    """Returns half of the cross-entropies (Goodfellow et al. 2014, arXiv:1406.2661)."""
    return 0.5 * (jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean())


def linear_generator(fake: Logits) -> Scalar:
    """Returns the negative mean of the logits."""
    return -fake.mean()


def non_saturating_generator(fake: Logits) -> Scalar:
    """Returns -log sigmoid of the logits (Goodfellow et al. 2014)."""
    return jax.nn.softplus(-fake).mean()


def round_to_levels(images: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Clips to [0, 1] and rounds to multiples of 1 / 255, the values of 8-bit images."""
    return jnp.round(jnp.clip(images, 0, 1) * 255) / 255


DISCRIMINATOR = {"hinge": hinge_discriminator, "vanilla": vanilla_discriminator}
GENERATOR = {"vanilla": linear_generator, "non_saturating": non_saturating_generator}


def lecam(real: Logits, fake: Logits, mean_real: Scalar, mean_fake: Scalar) -> Scalar:
    """Penalizes logits beyond the running mean of the other class (Tseng et al. 2021, arXiv:2104.03310, eq. 4)."""
    return (jax.nn.relu(real - mean_fake) ** 2).mean() + (jax.nn.relu(mean_real - fake) ** 2).mean()


def consistency(first: Logits, second: Logits) -> Scalar:
    """Returns the mean squared difference of logits of the same images under two augmentations.

    CR-GAN penalizes it for images (Zhang et al. 2019, arXiv:1910.12027), bCR for generated images as well (Zhao et al.
    2020, arXiv:2002.04724); there one of the two is the image itself.
    """
    return ((first - second) ** 2).mean()


def adaptive_weight(reconstruction: Float[Array, "*n"], adversarial: Float[Array, "*n"], largest: float) -> Scalar:
    """Returns |reconstruction| / |adversarial|, at most `largest` (Esser et al. 2021, arXiv:2012.09841, eq. 7).

    Both are gradients with respect to the kernel of the decoder's last layer.
    """
    ratio = jnp.linalg.norm(reconstruction) / (jnp.linalg.norm(adversarial) + 1e-6)
    return jnp.clip(ratio, 0, largest)
