"""Finds the latents that the decoder turns into a given image, by gradient descent through a jitted decoder.

python examples/invert_an_image.py runs/quickstart cat.png inverted.png
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from vqrae_jax import Tokenizer, runtime
from vqrae_jax.data import images
from vqrae_jax.errors import report_errors
from vqrae_jax.progress import progress


def invert(
    tokenizer: Tokenizer, image: np.ndarray, steps: int = 100, learning_rate: float = 0.05
) -> tuple[jax.Array, list[float]]:
    """Optimizes latents for `image` [1, S, S, 3] in [0, 1], starting from its codes.

    Returns:
      The latents, and the mean squared error before each step.
    """
    encode, decode = tokenizer.function("encode"), tokenizer.function("decode")
    variables = tokenizer.variables

    def loss(latents):
        return jnp.mean((decode(variables, latents) - image) ** 2)

    @jax.jit
    def step(latents):
        value, gradient = jax.value_and_grad(loss)(latents)
        return latents - learning_rate * gradient / (jnp.sqrt(jnp.mean(gradient**2)) + 1e-12), value

    latents, errors = jax.jit(encode)(variables, image), []
    for _ in progress(range(steps), steps, "steps"):
        latents, value = step(latents)
        errors.append(float(value))
    return latents, errors


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="of the tokenizer")
    parser.add_argument("image", help="image to invert")
    parser.add_argument("output", help="image to write")
    args = parser.parse_args()
    with report_errors(), runtime.log_lines():
        runtime.start()
        image, tokenizer = images.read_image(args.image), Tokenizer.load(args.checkpoint)
        square = images.center_crop(image, tokenizer.image_size)
        latents, errors = invert(tokenizer, square[None] / np.float32(255))
        images.write_image(args.output, (tokenizer.decode(latents)[0] * 255 + 0.5).astype(np.uint8))
        print(f"mean squared error {errors[0]:.4f} -> {errors[-1]:.4f}, wrote {args.output}")
