"""Computes mean, variance and principal axes of an encoder's latents over images, for `model.normalization_stat_path`.

vqrae latent-statistics --encoder=facebook/dinov2-with-registers-base --data=/data/train --output=stats.npz

The file names the latents that it describes (encoder, layers, fusion, input size), and models with others refuse it.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from vqrae_jax import sharding, storage
from vqrae_jax.build.tokenizer import build_tokenizer, describe_latents, freeze_encoder
from vqrae_jax.commands import command_line
from vqrae_jax.config import ModelConfig, from_dict
from vqrae_jax.data import pipeline
from vqrae_jax.errors import DataError
from vqrae_jax.evaluation.moments import Moments
from vqrae_jax.pretrained import writers
from vqrae_jax.progress import progress

ARGUMENTS = command_line.DATA_ARGUMENTS | {  # by the config fields that they set
    "data.image_size": "--size", "model.encoder_input_size": "--size", "model.encoder_config_path": "--encoder",
    "model.encoder_params.layers": "--layers",
}  # fmt: skip


def layers(text: str) -> tuple[int, ...]:
    """Parses a value of --layers."""
    return tuple(int(layer) for layer in text.split(","))


parser = command_line.Parser("latent-statistics", __doc__.partition("\n\n")[0])
parser.add("--encoder", "hub id or local folder: value of model.encoder_config_path", required=True)
parser.add_encoder_class("model.encoder_cls")
parser.add_count("--size", "pixels: value of model.encoder_input_size", 224)
parser.add("--layers", "value of model.encoder_params.layers, such as 2,6,-1", default=(-1,), type=layers)
parser.add("--fusion", "value of model.encoder_params.fusion", default="mean", choices=["sum", "mean", "concat"])
parser.add("--no-normalize", "model.encoder_params.normalize=False", action="store_true")
parser.add_data()
parser.add("--output", "file to write, .npz", required=True)
parser.add("--per-position", "mean and variance per position: [h, w, C]", action="store_true")
parser.add_count("--components", "number of principal axes", 64)
parser.add_batch_and_limit(32)


@command_line.names_arguments(ARGUMENTS)
def latent_statistics(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Runs the command; returns the arrays that it writes."""
    output = command_line.output_file(args.output, (".npz",))
    model = {"encoder_cls": args.encoder_cls, "encoder_config_path": args.encoder, "encoder_input_size": args.size}
    features = {"layers": args.layers, "fusion": args.fusion, "normalize": not args.no_normalize}
    config = from_dict(ModelConfig, model | {"decoder_config_path": "ViT-S", "encoder_params": features})
    built = build_tokenizer(config)
    description = describe_latents(config, built.module.encoder) | {"encoder": args.encoder}
    description["sha256"] = writers.content_hash(built.pretrained["encoder"])
    built = freeze_encoder(built)
    params = {"params": jax.device_put(built.pretrained["encoder"])}
    mesh = sharding.make_mesh()
    batch_size = -(-args.batch // mesh.size) * mesh.size
    data = command_line.data_config(args, image_size=args.size, eval_batch_size=batch_size)
    batches = pipeline.evaluation_batches(data, limit=args.limit)
    channels, positions = estimate(
        lambda image: built.module.encoder.apply(params, image), progress(batches, len(batches), "batches"), mesh
    )
    if not (images := positions.count):
        raise DataError(f"none of its {batches.count} images is readable", field="--data", value=args.data)
    if skipped := batches.count - images:
        print(f"skipped {skipped} images that cannot be read", file=sys.stderr)
    result = summarize(channels, positions if args.per_position else None, args.components)
    with storage.stage_output(output) as file:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, latent=json.dumps(description), **result)
    share = result["pca_var"].sum() * channels.count / np.trace(channels.products)
    print(f"{images} images; {len(result['pca_var'])} axes hold {share:.1%} of the variance; wrote {output}")
    return result


def estimate(
    encode: Callable[[Array], Array], batches: Iterable[dict[str, np.ndarray]], mesh: Mesh
) -> tuple[Moments, Moments]:
    """Computes moments of `encode(images)`, [b, h, w, C], in one pass over batches, split over the mesh's "data" axis.

    Batches are {"image": [b, H, W, 3] uint8 or floats in [0, 1], "mask": bool [b]}, this process's parts, of one size.
    The first moments are of the channels [C] over images and positions, the second, diagonal, of [h, w, C] over images.
    """

    def step(images: Array, mask: Array) -> tuple[Array, ...]:
        """Sums over the images whose mask is one; float32 is enough for deviations from the means of a batch."""
        images = images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images
        latents, mask = encode(images).astype(jnp.float32), mask.astype(jnp.float32)
        weights = mask[:, None, None, None]
        mean = jnp.sum(latents * weights, axis=0) / jnp.sum(mask)
        squares = jnp.sum(((latents - mean) * weights) ** 2, axis=0)
        centered = (latents - jnp.mean(mean, axis=(0, 1))) * weights
        products = jnp.einsum("bhwc,bhwd->cd", centered, centered, precision=jax.lax.Precision.HIGHEST)
        return jnp.sum(mask), mean, squares, products

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


def summarize(channels: Moments, positions: Moments | None, components: int) -> dict[str, np.ndarray]:
    """Returns the arrays of a file of statistics, float32, from the moments that `estimate` returns.

    They are mean and var, [C] or with `positions` [h, w, C]; pca_mean [C], pca_basis [C, components] and pca_var.
    """
    covariance = channels.products / channels.count
    var, basis = np.linalg.eigh(covariance)
    largest = np.argsort(var)[::-1][:components]
    arrays = {"mean": channels.mean, "var": np.diagonal(covariance)}
    if positions is not None:
        arrays = {"mean": positions.mean, "var": positions.products / positions.count}
    arrays |= {"pca_mean": channels.mean, "pca_basis": basis[:, largest], "pca_var": np.maximum(var[largest], 0)}
    return {name: np.asarray(value, np.float32) for name, value in arrays.items()}


main = command_line.build_main(parser, latent_statistics)

if __name__ == "__main__":
    main()
