"""Computes mean, variance and principal axes of an encoder's latents over images, for `model.normalization_stat_path`.

vqrae latent-statistics --encoder=facebook/dinov2-base --data=/data/train --output=stats.npz
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
from vqrae_jax.commands import command_line
from vqrae_jax.config import EncoderClass, ModelConfig, from_dict
from vqrae_jax.data import pipeline
from vqrae_jax.errors import DataError
from vqrae_jax.evaluation.moments import Moments

log = logging.getLogger(__name__)

ARGUMENTS = command_line.DATA_ARGUMENTS | {  # by the config fields that they set
    "data.image_size": "--size", "model.encoder_input_size": "--size", "model.encoder_config_path": "--encoder",
}  # fmt: skip


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = command_line.build_parser(
        "latent-statistics",
        "Computes mean, variance and principal axes of an encoder's latents over images, for "
        "model.normalization_stat_path.",
    )
    parser.add_argument("--encoder", required=True, help="hub id or local folder: value of model.encoder_config_path")
    parser.add_argument(
        "--encoder-cls", choices=get_args(EncoderClass), default="Dinov2withNorm", metavar="ENCODER_CLS",
        help="value of model.encoder_cls; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--size", type=command_line.positive, default=224,
        help="pixels: value of model.encoder_input_size; default: %(default)s",
    )  # fmt: skip
    command_line.add_data(parser)
    parser.add_argument("--output", required=True, help="file to write, .npz")
    parser.add_argument("--per-position", action="store_true", help="mean and variance per position: [h, w, C]")
    parser.add_argument(
        "--components", type=command_line.positive, default=64, help="number of principal axes; default: %(default)s"
    )
    command_line.add_batch(parser, 32)
    command_line.add_limit(parser)
    return parser.parse_args(argv)


@command_line.names_arguments(ARGUMENTS)
def latent_statistics(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Runs the command; returns the arrays that it writes."""
    output = storage.resolve_path(args.output)
    if output.suffix != ".npz":
        raise DataError("its suffix must be .npz", field="--output", value=args.output)
    model = {"encoder_cls": args.encoder_cls, "encoder_config_path": args.encoder, "encoder_input_size": args.size}
    built = freeze_encoder(build_tokenizer(from_dict(ModelConfig, model | {"decoder_config_path": "ViT-S"})))
    params = {"params": jax.device_put(built.pretrained["encoder"])}
    mesh = sharding.make_mesh()
    batch_size = -(-args.batch // mesh.size) * mesh.size
    data = command_line.data_config(args, image_size=args.size, eval_batch_size=batch_size)
    batches = pipeline.evaluation_batches(data, limit=args.limit)
    channels, positions = estimate(lambda image: built.module.encoder.apply(params, image), batches, mesh)
    images = positions.count
    if not images:
        raise DataError(f"none of its {batches.count} images is readable", field="--data", value=args.data)
    if skipped := batches.count - images:
        log.warning("skipped %d images that cannot be read", skipped)
    result = summarize(channels, positions if args.per_position else None, args.components)
    with storage.stage_output(output) as file:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, **result)
    share = result["pca_var"].sum() * channels.count / np.trace(channels.products)
    print(f"{images} images; {len(result['pca_var'])} axes hold {share:.1%} of the variance; wrote {output}")
    return result


def estimate(
    encode: Callable[[Float[Array, "B H W 3"]], Float[Array, "B h w C"]],
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
) -> tuple[Moments, Moments]:
    """Computes moments of latents in one pass over batches of images.

    Args:
      encode: images in [0, 1] to latents.
      batches: {"image": [b, H, W, 3] uint8 or floats in [0, 1], "mask": bool [b]}, this process's parts, of one size.
      mesh: its "data" axis divides the batch.

    Returns:
      Moments of the channels [C] over images and positions, and diagonal moments of the latents [h, w, C] over images.
    """

    def step(image: Array, mask: Array) -> tuple[Array, ...]:
        image = image.astype(jnp.float32) / 255 if image.dtype == jnp.uint8 else image
        return jnp.sum(mask), *batch_moments(encode(image), mask.astype(jnp.float32))

    step = jax.jit(step, out_shardings=sharding.replicated(mesh))
    channels, positions = Moments(), Moments(diagonal=True)
    for batch in batches:
        batch = sharding.place_batch({name: batch[name] for name in ("image", "mask")}, mesh)
        count, mean, squares, products = jax.device_get(step(batch["image"], batch["mask"]))
        if count:
            h, w, _ = mean.shape
            channels.merge(int(count) * h * w, mean.mean((0, 1), dtype=np.float64), products)
            positions.merge(int(count), mean, squares)
    return channels, positions


def batch_moments(
    latents: Float[Array, "B h w C"], mask: Float[Array, " B"]
) -> tuple[Float[Array, "h w C"], Float[Array, "h w C"], Float[Array, "C C"]]:
    """Computes the mean, squares and channel products of the images whose mask is one.

    Deviations are from the means of the batch, so that float32 is enough.
    """
    latents = latents.astype(jnp.float32)
    weights = mask[:, None, None, None]
    mean = jnp.sum(latents * weights, axis=0) / jnp.sum(mask)
    squares = jnp.sum(((latents - mean) * weights) ** 2, axis=0)
    centered = (latents - jnp.mean(mean, axis=(0, 1))) * weights
    products = jnp.einsum("bhwc,bhwd->cd", centered, centered, precision=jax.lax.Precision.HIGHEST)
    return mean, squares, products


def summarize(channels: Moments, positions: Moments | None, components: int) -> dict[str, np.ndarray]:
    """Returns the arrays of a file of statistics, float32.

    Args:
      channels: see `estimate`.
      positions: see `estimate`; None: mean and variance are per channel.
      components: number of principal axes.

    Returns:
      mean, var: [C], or [h, w, C] with `positions`.
      pca_mean [C], pca_basis [C, components], pca_var [components].
    """
    covariance = channels.products / channels.count
    var, basis = np.linalg.eigh(covariance)
    largest = np.argsort(var)[::-1][:components]
    arrays = {"mean": channels.mean, "var": np.diagonal(covariance)}
    if positions is not None:
        arrays = {"mean": positions.mean, "var": positions.products / positions.count}
    arrays |= {"pca_mean": channels.mean, "pca_basis": basis[:, largest], "pca_var": np.maximum(var[largest], 0)}
    return {name: np.asarray(value, np.float32) for name, value in arrays.items()}


def main(argv: Sequence[str] | None = None) -> None:
    command_line.run(lambda: latent_statistics(parse(argv)))


if __name__ == "__main__":
    main()
