"""Your own jitted code around a tokenizer: the latent that the decoder paints most like a picture, by gradient descent.

python examples/invert_a_picture.py runs/quickstart cat.png found.png
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from vqrae_jax import Tokenizer
from vqrae_jax.data import images


def invert(
    tokenizer: Tokenizer, picture: np.ndarray, steps: int = 100, rate: float = 0.05
) -> tuple[jax.Array, list[float]]:
    """A latent for `picture` [1, S, S, 3] in [0, 1], starting from its codes; and the errors on the way."""
    encode, decode = tokenizer.function("encode"), tokenizer.function("decode")
    variables = tokenizer.variables

    def error(latent):
        return jnp.mean((decode(variables, latent) - picture) ** 2)

    @jax.jit
    def step(latent):
        value, slope = jax.value_and_grad(error)(latent)
        return latent - rate * slope / (jnp.sqrt(jnp.mean(slope**2)) + 1e-12), value

    latent, errors = jax.jit(encode)(variables, picture), []
    for _ in range(steps):
        latent, value = step(latent)
        errors.append(float(value))
    return latent, errors


if __name__ == "__main__":
    checkpoint, source, target = sys.argv[1:]
    tokenizer = Tokenizer.load(checkpoint)
    square = images.center_crop(images.read_image(source), tokenizer.image_size)
    latent, errors = invert(tokenizer, square[None] / np.float32(255))
    images.write_image(target, (tokenizer.decode(latent)[0] * 255 + 0.5).astype(np.uint8))
    print(f"mean squared error {errors[0]:.4f} -> {errors[-1]:.4f}, wrote {target}")
