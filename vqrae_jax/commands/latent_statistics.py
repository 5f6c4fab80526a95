"""python -m vqrae_jax.commands.latent_statistics --encoder=facebook/dinov2-base --data=/data/train --output=stats.npz

Mean, variance and principal axes of an encoder's latents over images; `model.normalization_stat_path` reads the file.
"""

import argparse
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from vqrae_jax import sharding, storage
from vqrae_jax.build.tokenizer import build_tokenizer, freeze_encoder
from vqrae_jax.commands import command_line as command
from vqrae_jax.commands import data_arguments as data_flags
from vqrae_jax.config import EncoderClass, ModelConfig, from_dict
from vqrae_jax.data import pipeline
from vqrae_jax.errors import DataError
from vqrae_jax.evaluation.moments import Moments

log = logging.getLogger(__name__)


class LatentMoments:
    """Moments of latents [h, w, C]: of the images at each position, and of all positions' channels."""

    def __init__(self):
        self.positions, self.channels = Moments(diagonal=True), Moments()

    def merge(self, count: int, mean: np.ndarray, squares: np.ndarray, products: np.ndarray) -> None:
        """Adds a batch of `count` images, of which `batch_moments` has computed the other arguments."""
        self.positions.merge(count, mean, squares)
        self.channels.merge(count * mean.shape[0] * mean.shape[1], mean.mean((0, 1), dtype=np.float64), products)

    def result(self, per_position: bool, components: int) -> dict[str, np.ndarray]:
        """Returns `mean` and `var` ([C] or [h, w, C]), `pca_mean` [C], `pca_basis` [C, components], `pca_var`."""
        mean, covariance = self.channels.mean, self.channels.products / self.channels.count
        var, basis = np.linalg.eigh(covariance)
        largest = np.argsort(var)[::-1][:components]
        if per_position:
            moments = {"mean": self.positions.mean, "var": self.positions.products / self.positions.count}
        else:
            moments = {"mean": mean, "var": np.diagonal(covariance)}
        pca = {"pca_mean": mean, "pca_basis": basis[:, largest], "pca_var": np.maximum(var[largest], 0)}
        return {name: np.asarray(value, np.float32) for name, value in (moments | pca).items()}


def batch_moments(
    latent: Float[Array, "B h w C"], mask: Float[Array, " B"]
) -> tuple[Float[Array, "h w C"], Float[Array, "h w C"], Float[Array, "C C"]]:
    """Returns the mean [h, w, C], squares [h, w, C] and products [C, C] of the images whose mask is one."""
    latent = latent.astype(jnp.float32)
    keep, count = mask[:, None, None, None], jnp.sum(mask)
    mean = jnp.sum(latent * keep, axis=0) / count
    centred = (latent - mean) * keep
    across = (latent - jnp.mean(mean, axis=(0, 1))) * keep
    products = jnp.einsum("bhwc,bhwd->cd", across, across, precision=jax.lax.Precision.HIGHEST)
    return mean, jnp.sum(centred**2, axis=0), products


def estimate(
    encode: Callable[[Float[Array, "B H W 3"]], Float[Array, "B h w C"]],
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
) -> LatentMoments:
    """One pass over batches of images, spread over the mesh.

    Args:
      encode: images in [0, 1] to latents.
      batches: {"image": [b, H, W, 3] uint8 or floats in [0, 1], "mask": bool [b]}, this process's parts, of one size.
      mesh: its "data" axis divides the batch.
    """

    def step(image: Array, mask: Array) -> tuple[Array, ...]:
        image = image.astype(jnp.float32) / 255 if image.dtype == jnp.uint8 else image
        return jnp.sum(mask), *batch_moments(encode(image), mask.astype(jnp.float32))

    step, moments = jax.jit(step, out_shardings=sharding.replicated(mesh)), LatentMoments()
    for batch in batches:
        placed = sharding.place_batch({name: batch[name] for name in ("image", "mask")}, mesh)
        count, *sums = jax.device_get(step(placed["image"], placed["mask"]))
        if count:
            moments.merge(int(count), *sums)
    return moments


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vqrae_jax.commands.latent_statistics", description=__doc__.partition("\n\n")[2]
    )
    parser.add_argument("--encoder", required=True, help="hub id or local folder, as model.encoder_config_path")
    parser.add_argument(
        "--encoder-cls", choices=get_args(EncoderClass), default="Dinov2withNorm", metavar="ENCODER_CLS",
        help="as model.encoder_cls; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--size", type=command.at_least_1, default=224, help="pixels, as model.encoder_input_size; default: %(default)s"
    )
    data_flags.add(parser)
    parser.add_argument("--output", required=True, help="file to write, .npz")
    parser.add_argument("--per-position", action="store_true", help="mean and variance per position too: [h, w, C]")
    parser.add_argument(
        "--components", type=command.at_least_1, default=64, help="principal axes to keep; default: %(default)s"
    )
    parser.add_argument("--batch", type=command.at_least_1, default=32, help="images at once; default: %(default)s")
    parser.add_argument("--limit", type=command.at_least_1, help="images to use; all by default")
    return parser.parse_args(argv)


@data_flags.told()
def latent_statistics(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Runs the command; returns what it wrote."""
    output = storage.resolve_path(args.output)
    if output.suffix != ".npz":
        raise DataError(f"--output={output}: the statistics are written as .npz")
    model = {"encoder_cls": args.encoder_cls, "encoder_config_path": args.encoder, "encoder_input_size": args.size}
    built = freeze_encoder(build_tokenizer(from_dict(ModelConfig, model | {"decoder_config_path": "ViT-S"})))
    params = {"params": jax.device_put(built.pretrained["encoder"])}
    mesh = sharding.make_mesh()
    batch = -(-args.batch // mesh.size) * mesh.size
    data = data_flags.data_config(args, image_size=args.size, eval_batch_size=batch)
    batches = pipeline.evaluation_batches(data, limit=args.limit)
    moments = estimate(lambda image: built.module.encoder.apply(params, image), batches, mesh)
    if not (images := moments.positions.count):
        raise DataError(f"--data={args.data}: none of {batches.count} images is readable")
    result = moments.result(args.per_position, args.components)
    with storage.stage_output(output) as place:
        place.parent.mkdir(parents=True, exist_ok=True)
        np.savez(place, **result)
    share = result["pca_var"].sum() * moments.channels.count / np.trace(moments.channels.products)
    if skipped := batches.count - images:
        log.warning("skipped: %d images that cannot be read", skipped)
    print(f"{images} images; {len(result['pca_var'])} axes hold {share:.1%} of the variance; wrote {output}")
    return result


def main() -> None:
    command.run(lambda: latent_statistics(parse()))


if __name__ == "__main__":
    main()
