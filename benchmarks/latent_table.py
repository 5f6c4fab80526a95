"""Trains decoders from different latents or codes of one frozen encoder, with equal steps, and prints a table.

python benchmarks/latent_table.py --images=photographs --encoder=vit-tiny --output=latent_table

The rows are combinations of the encoder's layers, heads that predict these layers, tokens that are free of the grid,
and codebooks that learn by gradients. The encoder runs once; then, for each row and seed, the quantizer and a small
decoder train together by Muon.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import statistics
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # the checkout

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float, UInt8

from benchmarks.time_to_quality import GRID, QUALITY, SIZE, Judge, read_images
from vqrae_jax.benchmark.machine import describe_machine, format_machine
from vqrae_jax.build.tokenizer import build_tokenizer, freeze_encoder, initial_variables
from vqrae_jax.commands import command_line
from vqrae_jax.commands.command_line import count
from vqrae_jax.config import ModelConfig, OptimizerConfig, from_dict
from vqrae_jax.errors import ConfigError
from vqrae_jax.losses.reconstruction import feature_distance, l2
from vqrae_jax.models.encoder import Encoder
from vqrae_jax.models.vqrae import VQRAE, Output
from vqrae_jax.quantizers.statistics import code_counts
from vqrae_jax.train.optim import make_tokenizer_optimizer

LAYERS = (0, 5, -1)
FEATURE_WEIGHT = 0.05  # of the distance 1 - cosine, of decoders that predict features
OPTIMIZER = OptimizerConfig(method="muon", learning_rate=4e-3, final_learning_rate=1e-5, warmup_steps=20, clip_norm=1.0)
BASE: dict[str, Any] = {
    "encoder_params.layers": LAYERS, "encoder_params.fusion": "concat", "decoder_config_path": "ViT-Nano",
    "decoder_patch_size": SIZE // GRID, "decoder_head": "overlap", "num_embeddings": 4096, "commitment_cost": 0.02,
    "vq_decay": 0.95, "quantizer_params.codebook_dim": 16, "encoder_input_size": GRID,
}  # fmt: skip
TOKENS = {"encoder_params.fusion": "linear", "decoder_grid": GRID}
FEATURES = {"decoder_features": LAYERS}
# Changes of BASE in the model section; the encoder's input size is in patches.
ROWS: dict[str, dict[str, Any]] = {
    "last layer": {"encoder_params.layers": (-1,)},
    "mean": {"encoder_params.fusion": "mean"},
    "linear fusion": {"encoder_params.fusion": "linear"},
    "routed fusion": {"encoder_params.fusion": "routed"},
    "concatenated": {},
    "linear feature head": FEATURES,
    "feature decoder": FEATURES | {"decoder_feature_blocks": 2},
    "256 tokens": TOKENS | {"resampler_tokens": 256},
    "256 tokens of 21 x 21 patches": TOKENS | {"resampler_tokens": 256, "encoder_input_size": 21},
    "128 tokens": TOKENS | {"resampler_tokens": 128},
    "128 tokens, nested": TOKENS | {"resampler_tokens": 128, "resampler_nested": True},
    "vq": {"quantizer": "vq"},
    "vq, DiVeQ": {
        "quantizer": "vq", "quantizer_params.estimator": "diveq", "quantizer_params.codebook_cost": 0.0,
        "commitment_cost": 0.0,
    },
    "vq, revival": {"quantizer": "vq", "quantizer_params.revival_decay": 0.9},
    "simvq": {"quantizer": "simvq", "quantizer_params.distance": "l2"},
    "simvq, bridge": {
        "quantizer": "simvq", "quantizer_params.distance": "l2", "quantizer_params.bridge_group": 16,
    },
}  # fmt: skip
COLUMNS = QUALITY | {"use": "codes in use"}


def main(arguments: list[str]) -> None:
    """Prints all rows, medians over seeds; writes rows.json with the values of each seed."""
    args = parse(arguments)
    names = args.rows.split(";") if args.rows else list(ROWS)
    if unknown := set(names) - set(ROWS):
        raise ConfigError(f"must be among {list(ROWS)}", field="--rows", value="; ".join(sorted(unknown)))
    print(format_machine(), flush=True)
    output = pathlib.Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    images = {split: read_images(args, split) for split in ("train", "validation")}
    judge, rows, latents = Judge(images["validation"], args.encoder, args.encoder_cls), [], {}
    for name in names:
        config = build_config(args, name)
        built = freeze_encoder(build_tokenizer(config))
        if (size := config.encoder_input_size) not in latents:
            latents = {size: {split: encode(built, images[split]) for split in images}}  # one size in memory
        for seed in range(args.seeds):
            start = time.perf_counter()
            variables = train(built, latents[size]["train"], images["train"], args, seed)
            seconds = time.perf_counter() - start
            quality = judge.measure(reconstruct(built.module, variables, latents[size]["validation"]))
            quality["use"] = measure_use(built.module, variables, latents[size]["train"])
            rows.append({"row": name, "seed": seed, "seconds": seconds, **quality})
            values = ", ".join(f"{label} {quality[key]:.4g}" for key, label in COLUMNS.items())
            print(f"{name}, seed {seed}, {seconds:.0f} s: {values}", flush=True)
            context = {"machine": describe_machine(), "arguments": vars(args), "rows": rows}
            (output / "rows.json").write_text(json.dumps(context, indent=2))
    report(rows)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder with images in train/ and val/")
    parser.add_argument("--encoder", required=True, help="folder or hub id, model.encoder_config_path")
    parser.add_argument("--encoder-cls", default="Dinov2withNorm", help="model.encoder_cls")
    parser.add_argument("--patch", type=count, default=16, help="patch size of the encoder")
    parser.add_argument("--steps", type=count, default=200, help="optimizer steps of every row")
    parser.add_argument("--batch", type=count, default=32, help="images per batch")
    parser.add_argument("--seeds", type=count, default=3, help="number of seeds")
    parser.add_argument("--rows", help="names, separated by semicolons; default: all")
    parser.add_argument("--output", required=True, type=os.path.expanduser, help="folder for rows.json")
    return parser.parse_args(arguments)


def build_config(args: argparse.Namespace, name: str) -> ModelConfig:
    """Returns the model section of a row."""
    settings = BASE | ROWS[name] | {"encoder_cls": args.encoder_cls, "encoder_config_path": args.encoder}
    settings["encoder_input_size"] *= args.patch
    return from_dict(ModelConfig, unflatten_dict(settings, sep="."))


def layers_of(encoder: Encoder) -> Encoder:
    """Returns an encoder that concatenates LAYERS, from which the latents of every row are made."""
    return encoder.clone(layers=LAYERS, fusion="concat")


def encode(built: Any, images: UInt8[np.ndarray, "n S S 3"]) -> Float[np.ndarray, "n h w LC"]:
    """Returns the layers LAYERS of the frozen encoder, in 16 bits."""
    encoder, params = layers_of(built.module.encoder), {"params": jax.device_put(built.pretrained["encoder"])}
    apply = jax.jit(lambda image: encoder.apply(params, image.astype(jnp.float32) / 255).astype(jnp.float16))
    return np.concatenate([np.asarray(apply(images[i : i + 20])) for i in range(0, len(images), 20)])


def select(encoder: Encoder, layers: Float[Array, "n h w LC"]) -> Float[Array, "n h w C"]:
    """Returns the latents of an encoder, in place of its last steps."""
    parts = jnp.split(layers.astype(jnp.float32), len(LAYERS), axis=-1)
    if encoder.layers == (-1,):
        return parts[-1]
    return sum(parts) / len(parts) if encoder.fusion == "mean" else jnp.concatenate(parts, axis=-1)


def train(
    built: Any, latents: Float[np.ndarray, "n h w LC"], images: UInt8[np.ndarray, "n S S 3"],
    args: argparse.Namespace, seed: int,
) -> Any:  # fmt: skip
    """Returns the variables of quantizer and decoder after training."""
    module, key = built.module, jax.random.key(seed)
    variables = initial_variables(dataclasses.replace(built, pretrained={}), key, ("quantizer", "decoder"))
    optimizer = make_tokenizer_optimizer(OPTIMIZER)

    def loss(params: Any, state: Any, layers: Array, image: Array, key: Array) -> tuple[Array, Any]:
        noise, codes = jax.random.split(key)
        out, updated = module.apply(
            {"params": params, "batch_stats": state}, select(module.encoder, layers), True, method="forward_encoded",
            mutable=["batch_stats"], rngs={"noise": noise, "codes": codes},
        )  # fmt: skip
        total = l2(out.reconstruction, image.astype(jnp.float32) / 255) + out.quantized.loss
        if out.features is not None:
            total += FEATURE_WEIGHT * feature_distance("cosine", out.features, layers, len(LAYERS))
        return total, updated["batch_stats"]

    def step(params: Any, state: Any, moments: Any, *batch: Array) -> tuple[Any, Any, Any]:
        grads, state = jax.grad(loss, has_aux=True)(params, state, *batch)
        updates, moments = optimizer.update(grads, moments, params, horizon=args.steps)
        return jax.tree.map(jnp.add, params, updates), state, moments

    step, rng, order = jax.jit(step, donate_argnums=(0, 1, 2)), np.random.default_rng(seed), np.empty(0, int)
    carry = variables["params"], variables["batch_stats"], optimizer.init(variables["params"])
    for i in range(args.steps):
        if len(order) < args.batch:
            order = rng.permutation(len(images))
        batch, order = order[: args.batch], order[args.batch :]
        carry = step(*carry, latents[batch], images[batch], jax.random.fold_in(key, i))
    return {"params": carry[0], "batch_stats": carry[1]}


def reconstruct(module: VQRAE, variables: Any, latents: Float[np.ndarray, "n h w LC"]) -> Float[np.ndarray, "n S S 3"]:
    """Decodes the quantized latents of the validation images."""

    @jax.jit
    def run(layers: Array) -> Array:
        out: Output = module.apply(variables, select(module.encoder, layers), method="forward_encoded")
        return out.reconstruction

    return np.concatenate([np.asarray(run(latents[i : i + 20])) for i in range(0, len(latents), 20)])


def measure_use(module: VQRAE, variables: Any, latents: Float[np.ndarray, "n h w LC"]) -> float:
    """Returns the share of codes that the training images have."""

    @jax.jit
    def count_codes(layers: Array) -> Array:
        quantized = module.apply(variables, select(module.encoder, layers), method="quantize")
        return code_counts(quantized.indices.reshape(-1), module.quantizer.num_embeddings)

    return float((sum(count_codes(latents[i : i + 20]) for i in range(0, len(latents), 20)) > 0).mean())


def report(rows: list[dict[str, Any]]) -> None:
    """Prints the median over seeds of each row, and the range of the PSNR."""
    print(f"\n| row | {' | '.join(COLUMNS.values())} | range of PSNR |\n|{' --- |' * (len(COLUMNS) + 2)}")
    seeds = collections.defaultdict(list)
    for row in rows:
        seeds[row["row"]].append(row)
    for name, own in seeds.items():
        cells = [f"{statistics.median(row[key] for row in own):.4g}" for key in COLUMNS]
        cells.append("{:.2f} to {:.2f}".format(*(limit(row["psnr"] for row in own) for limit in (min, max))))
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    command_line.run(lambda: main(sys.argv[1:]))
