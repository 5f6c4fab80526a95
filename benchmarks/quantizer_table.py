"""Trains all quantizers at equal bits on a frozen encoder and prints a table.

python benchmarks/quantizer_table.py --images=photographs --encoder=vit-tiny

The encoder runs once, and the outputs of its first and last layer are one latent. Then, for each row, the quantizer and
a new decoder with overlapping squares train together on these latents by Muon, with the same decoder, steps, batches
and learning rates in every row.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # the checkout

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from benchmarks.codebook_law import lloyd
from vqrae_jax.benchmark.machine import describe_machine, format_machine
from vqrae_jax.build.tokenizer import BuiltTokenizer, build_tokenizer, freeze_encoder
from vqrae_jax.commands import command_line
from vqrae_jax.commands.command_line import count
from vqrae_jax.config import DataConfig, ModelConfig, OptimizerConfig, from_dict
from vqrae_jax.data import pipeline
from vqrae_jax.errors import ConfigError
from vqrae_jax.evaluation import codebook_health
from vqrae_jax.evaluation.metrics import psnr
from vqrae_jax.losses.reconstruction import l2
from vqrae_jax.models.decoder import Decoder
from vqrae_jax.models.vit import patchify
from vqrae_jax.quantizers.base import Quantizer
from vqrae_jax.quantizers.factory import create
from vqrae_jax.train.optim import learning_rate, make_optimizer

BATCH = 32
QUANTIZER_RATE = 0.1  # learning rate of the quantizer, relative to the decoder's
LLOYD_ITERATIONS = 15
LEVELS = {2048: (8, 8, 6, 5), 8192: (8, 8, 8, 4, 4)}  # levels of fsq with about as many codes
OPTIMIZER = OptimizerConfig(learning_rate=4e-3, final_learning_rate=1e-5, warmup_steps=10, clip_norm=1.0)
# Rows whose quantized latents approximate the latents; in the others a learned map follows.
IN_LATENT_SPACE = {"none", "k-means", "ema", "ema whitening_dim=64", "ibq", "residual", "product", "multiscale"}
COLUMNS = {
    "quantizer": "{}", "bits per token": "{:.2f}", "error / variance": "{:.3f}", "PSNR, dB": "{:.2f}",
    "PSNR linear, dB": "{:.2f}", "use": "{:.0%}",
    "perplexity": "{:.0f}", "codes": "{}", "ms per step": "{:.0f}", "time / none": "{:.2f}",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Split:
    """Images and their latents."""

    latents: Float[np.ndarray, "n h w C"]
    images: UInt8[np.ndarray, "n S S 3"]


def main(arguments: list[str]) -> None:
    """Prints the table row by row; --output writes table.md and table.json.

    Raises:
      ConfigError: a row does not exist, or there are no settings for this codebook size.
    """
    args = parse(arguments)
    if args.codes not in LEVELS:
        raise ConfigError(f"must be {' or '.join(map(str, LEVELS))}", field="--codes", value=args.codes)
    built = _build(args)
    train, val = (_encode(args, built, split) for split in ("train", "val"))
    steps = args.steps or args.epochs * (len(train.images) // BATCH)
    configs = model_sections(args.codes, train.latents.shape[1], steps)
    names = args.quantizers.split(",") if args.quantizers else list(configs)
    if set(names) - set(configs):
        raise ConfigError(f"must be names of {', '.join(configs)}", field="--quantizers", value=args.quantizers)
    print(format_machine())
    print(f"{len(train.images)} + {len(val.images)} images, {steps} steps of {BATCH}, {args.codes} codes\n")
    lines = [" | ".join(COLUMNS), " | ".join(["---"] * len(COLUMNS))]
    print(*(f"| {line} |" for line in lines), sep="\n", flush=True)
    rows: list[dict[str, Any]] = []
    for name in ["none", *(n for n in names if n != "none")]:  # its time is the unit of the other times
        row = _row(name, configs[name], built.module.decoder, train, val, steps)
        row["time / none"] = row["ms per step"] / (rows[0] if rows else row)["ms per step"]
        rows.append(row)
        lines.append(" | ".join("-" if row[c] is None else form.format(row[c]) for c, form in COLUMNS.items()))
        print(f"| {lines[-1]} |", flush=True)
    if args.output:
        output = pathlib.Path(args.output)
        output.mkdir(parents=True, exist_ok=True)
        (output / "table.md").write_text("".join(f"| {line} |\n" for line in lines))
        context = {
            "codes": args.codes, "steps": steps, "batch": BATCH, "train_images": len(train.images),
            "val_images": len(val.images), "encoder": args.encoder,
            "machine": describe_machine(),
        }  # fmt: skip
        (output / "table.json").write_text(json.dumps({**context, "rows": rows}, indent=2))
        print(f"wrote {output}")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder with images in train/ and val/")
    parser.add_argument("--encoder", default="facebook/dinov2-small", help="model.encoder_config_path")
    parser.add_argument("--encoder-cls", default="Dinov2withNorm", help="model.encoder_cls")
    parser.add_argument("--size", type=count, default=224, help="pixels, model.encoder_input_size")
    parser.add_argument("--codes", type=count, default=2048, help="codebook size: 2048 or 8192")
    parser.add_argument("--epochs", type=count, default=8, help="passes over the training images")
    parser.add_argument("--steps", type=count, help="number of steps instead of --epochs")
    parser.add_argument("--limit", type=count, help="number of images of train/ and of val/; default: all")
    parser.add_argument("--quantizers", help="rows, separated by commas; default: all")
    parser.add_argument("--output", type=os.path.expanduser, help="folder for table.md and table.json")
    return parser.parse_args(arguments)


def model_sections(codes: int, grid: int, steps: int) -> dict[str, dict[str, Any]]:
    """Returns the model section of every row, all with about log2(codes) bits per token.

    A quantizer with more indices than tokens has a smaller codebook.
    """

    def model(quantizer: str, count: int, **params: Any) -> dict[str, Any]:
        return {"quantizer": quantizer, "num_embeddings": count, "quantizer_params": params}

    def shared(positions: int) -> int:
        return int(codes ** (grid**2 / positions))

    grids = tuple(sorted({1, 2, -(-grid // 4), grid // 2, grid}))
    return {
        "none": model("none", codes),
        "k-means": model("ema", codes, frozen=True),
        "ema": model("ema", codes),
        "ema angle": model("ema", codes, distance="angle"),
        "ema whitening_dim=64": model("ema", codes, whitening_dim=64),
        "ema codebook_dim=32": model("ema", codes, codebook_dim=32),
        "vq": model("vq", codes),
        "vq cosine codebook_dim=8": model("vq", codes, distance="cosine", codebook_dim=8),
        "vq angle": model("vq", codes, distance="angle"),
        "simvq": model("simvq", codes),
        "fsq": model("fsq", codes, levels=LEVELS[codes]),
        "fsq whitening_dim=16 linear": model("fsq", codes, levels=LEVELS[codes], whitening_dim=16, adapter="linear"),
        "lfq": model("lfq", codes),
        "bsq": model("bsq", codes),
        "gumbel": model("gumbel", codes, anneal_steps=steps),
        "ibq": model("ibq", codes),
        "residual": model("residual", shared(2 * grid**2), depth=2),
        "product": model("product", shared(2 * grid**2), groups=2),
        "multiscale": model("multiscale", shared(sum(g**2 for g in grids)), grids=grids),
    }


def _build(args: argparse.Namespace) -> BuiltTokenizer:
    """Builds the encoder, with a decoder small enough to train one per row."""
    config = {"encoder_cls": args.encoder_cls, "encoder_config_path": args.encoder, "encoder_input_size": args.size}
    config |= {"encoder_params": {"layers": (0, -1), "fusion": "concat"}}
    config = from_dict(ModelConfig, config | {"decoder_config_path": "ViT-Nano", "decoder_head": "overlap"})
    built = freeze_encoder(build_tokenizer(config))
    decoder = built.module.decoder
    blocks = dataclasses.replace(decoder.blocks, depth=1)
    decoder = decoder.clone(blocks=blocks, patch=args.size // decoder.grid)
    return dataclasses.replace(built, module=built.module.clone(decoder=decoder))


def _encode(args: argparse.Namespace, built: BuiltTokenizer, split: str) -> Split:
    """Reads and encodes the images of a subfolder."""
    data = {"eval_path": str(pathlib.Path(args.images) / split), "image_size": args.size, "eval_batch_size": BATCH}
    encoder, params = built.module.encoder, {"params": jax.device_put(built.pretrained["encoder"])}
    encode = jax.jit(lambda params, image: encoder.apply(params, image.astype(jnp.float32) / 255))
    parts = [
        (np.asarray(encode(params, batch["image"]))[batch["mask"]], batch["image"][batch["mask"]])
        for batch in pipeline.evaluation_batches(from_dict(DataConfig, data), limit=args.limit)
    ]
    return Split(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _row(name: str, model: dict[str, Any], decoder: Decoder, train: Split, val: Split, steps: int) -> dict[str, Any]:
    grid, channels = train.latents.shape[2:]
    quantizer = create(from_dict(ModelConfig, model), channels, grid)
    variables, seconds = _train(name, quantizer, decoder, train, steps)
    metrics = _evaluate(quantizer, decoder, variables, val)
    linear = _linear(quantizer, variables, train, val, decoder.patch)
    counts, positions = metrics.pop("counts"), metrics.pop("positions")
    health = {} if counts is None else codebook_health.health(counts)
    size = None if counts is None else counts.shape[-1]
    return {
        "quantizer": name,
        "bits per token": size and positions / grid**2 * math.log2(size),
        "error / variance": metrics["error"] if name in IN_LATENT_SPACE else None,
        "PSNR, dB": metrics["psnr"],
        "PSNR linear, dB": linear,
        "use": health.get("usage"),
        "perplexity": health.get("perplexity"),
        "codes": size and (f"{positions} x {size}" if positions != grid**2 else str(size)),
        "ms per step": 1e3 * seconds,
    }


def _train(
    name: str, quantizer: Quantizer, decoder: Decoder, data: Split, steps: int
) -> tuple[dict[str, dict[str, Any]], float]:
    """Returns the trained variables of quantizer and decoder, and the median seconds of a step."""
    variables = {
        "quantizer": jax.jit(quantizer.init)(jax.random.key(0), data.latents[:1]),
        "decoder": jax.jit(decoder.init)(jax.random.key(1), data.latents[:1]),
    }
    if name == "k-means":
        latents = data.latents.reshape(-1, data.latents.shape[-1])
        codebook = lloyd(latents, quantizer.num_embeddings, LLOYD_ITERATIONS)
        variables["quantizer"]["batch_stats"] |= {
            "codebook": codebook,
            "step": jnp.ones((), jnp.int32),
        }  # no k-means start
    params = {part: variables[part].get("params", {}) for part in variables}
    state = variables["quantizer"].get("batch_stats", {})

    # A quantizer trained by gradients diverges at the learning rate that is best for a new decoder.
    def rates(step: Array, horizon: Array) -> dict[str, Array]:
        rate = learning_rate(OPTIMIZER, step, horizon)
        return {"quantizer": QUANTIZER_RATE * rate, "decoder": rate}

    optimizer = make_optimizer(OPTIMIZER, rates, muon=True)

    def loss(params: Any, state: Any, z: Array, image: Array, key: Array) -> tuple[Array, Any]:
        quantized, updated = quantizer.apply(
            {"params": params["quantizer"], "batch_stats": state}, z, True, mutable=["batch_stats"], rngs={"codes": key}
        )
        decoded = decoder.apply({"params": params["decoder"]}, quantized.z)
        return l2(decoded, image.astype(jnp.float32) / 255) + quantized.loss, updated.get("batch_stats", {})

    def step(params: Any, state: Any, moments: Any, z: Array, image: Array, key: Array) -> tuple[Any, Any, Any]:
        grads, state = jax.grad(loss, has_aux=True)(params, state, z, image, key)
        updates, moments = optimizer.update(grads, moments, params, horizon=steps)
        return jax.tree.map(jnp.add, params, updates), state, moments

    step = jax.jit(step, donate_argnums=(0, 1, 2))
    carry, times = (params, state, optimizer.init(params)), []
    rng, order = np.random.default_rng(0), np.empty(0, int)
    for i in range(steps):
        if len(order) < BATCH:
            order = rng.permutation(len(data.images))
        batch, order = order[:BATCH], order[BATCH:]
        start = time.perf_counter()
        carry = step(*carry, data.latents[batch], data.images[batch], jax.random.fold_in(jax.random.key(2), i))
        jax.block_until_ready(carry)
        times.append(time.perf_counter() - start)
    params, state, _ = carry
    trained = {"quantizer": {"params": params["quantizer"], "batch_stats": state}}
    return trained | {"decoder": {"params": params["decoder"]}}, float(np.median(times[1:] or times))


def _evaluate(
    quantizer: Quantizer, decoder: Decoder, variables: dict[str, dict[str, Any]], data: Split
) -> dict[str, Any]:
    """Returns the error relative to the variance, the mean PSNR, counts of the codes, and indices per image."""

    def measure(variables: Any, z: Array, image: Array) -> tuple[Array, Array, Array | None, Any]:
        quantized = quantizer.apply(variables["quantizer"], z)
        decoded = decoder.apply(variables["decoder"], quantized.z)
        error = jnp.sum((quantized.z - z) ** 2)
        decibels = psnr(decoded, image.astype(jnp.float32) / 255)
        return error, decibels, quantized.metrics.get("counts"), quantized.indices

    measure, parts = jax.jit(measure), []
    for i in _starts(data):
        parts.append(jax.device_get(measure(variables, data.latents[i : i + BATCH], data.images[i : i + BATCH])))
    errors, decibels, counts, indices = zip(*parts, strict=True)
    return {
        "error": float(sum(errors) / data.latents.size / np.var(data.latents, axis=(0, 1, 2)).mean()),
        "psnr": float(np.concatenate(decibels).mean()),
        "counts": None if counts[0] is None else sum(counts),
        "positions": None if indices[0] is None else indices[0][0].size,
    }


def _linear(quantizer: Quantizer, variables: dict[str, dict[str, Any]], train: Split, val: Split, patch: int) -> float:
    """Returns the PSNR of the best decoder that is linear in each quantized latent (least squares on `train`)."""

    def rows(z: Array, image: Array) -> tuple[Array, Array]:
        latent = quantizer.apply(variables["quantizer"], z).z
        latent = latent.reshape(-1, latent.shape[-1])
        return jnp.concatenate([latent, jnp.ones((len(latent), 1))], 1), patchify(image / 255.0, patch)

    @jax.jit
    def products(z: Array, image: Array) -> tuple[Array, Array]:
        x, pixels = rows(z, image)
        return x.T @ x, x.T @ pixels.reshape(len(x), -1)

    @jax.jit
    def measure(z: Array, image: Array, weights: Array) -> Array:
        x, pixels = rows(z, image)
        return psnr((x @ weights).reshape(pixels.shape), pixels)

    parts = [products(train.latents[i : i + BATCH], train.images[i : i + BATCH]) for i in _starts(train)]
    square, mixed = (np.sum([np.asarray(part[j], np.float64) for part in parts], 0) for j in range(2))
    weights = np.linalg.solve(square + 1e-4 * np.trace(square) / len(square) * np.eye(len(square)), mixed)
    weights = weights.astype(np.float32)
    decibels = [measure(val.latents[i : i + BATCH], val.images[i : i + BATCH], weights) for i in _starts(val)]
    return float(np.concatenate(decibels).mean())


def _starts(data: Split) -> range:
    return range(0, len(data.images), BATCH)


if __name__ == "__main__":
    command_line.run(lambda: main(sys.argv[1:]))
