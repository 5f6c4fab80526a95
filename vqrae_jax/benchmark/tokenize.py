"""Tokenizing a folder of images, read from and written to disk, against the bare encoder and search.

Four ways to do the same batches, in turns: the compiled program on pictures that lie on the device; reading and
cropping alone; arrays in memory through the tokenizer, which adds what the host does between batches; and the whole way
from disk to disk. Where the third costs as much as the first there is no gap between batches. The fourth can only be as
fast as the slower of the first two, and where the device is the CPU itself, reading takes its time from the encoder.
"""

import argparse
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vqrae_jax.benchmark.input import write_photographs
from vqrae_jax.benchmark.stages import DINOV2
from vqrae_jax.build.tokenizer import build_tokenizer, initial_variables
from vqrae_jax.commands import tokenize
from vqrae_jax.config import ModelConfig
from vqrae_jax.data import codes, pipeline
from vqrae_jax.data.readable import Skipped
from vqrae_jax.errors import ConfigError
from vqrae_jax.inference.tokenizer import Tokenizer

BARE, READ, HOST, WHOLE = "encoder and search alone", "reading alone", "from memory", "from disk to disk"


def main(arguments: list[str]) -> None:
    """Prints a Markdown table: images per second of each way, the best of some rounds, and its time / the first's."""
    given = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="vqrae-jax-") as scratch:
        folder = given.data or write_photographs(pathlib.Path(scratch), given.limit or 256)
        batch = ["--batch", str(given.batch), "--shard-size", str(8 * given.batch), "--threads", str(given.threads)]
        limit = ["--limit", str(given.limit)] if given.limit else []
        args = tokenize.parse(["--checkpoint", "-", "--data", folder, "--output", scratch, *batch, *limit])
        tokenizer = Tokenizer.load(given.checkpoint) if given.checkpoint else untrained(given.encoder, given.codes)
        ways, images = prepare(args, tokenizer)
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(given.rounds):
            best = {name: min(best[name], way()) for name, way in ways.items()}
    print(
        f"{images} images in batches of {given.batch}, {tokenizer.image_size} pixels, {len(jax.local_devices())} x "
        f"{jax.devices()[0].device_kind}; the best of {given.rounds} rounds\n\n"
        "| way | images per second | time / bare |\n| --- | --- | --- |"
    )
    for name, seconds in best.items():
        print(f"| {name} | {images / seconds:.1f} | {seconds / best[BARE]:.3f} |")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m vqrae_jax.benchmark tokenize", description=__doc__)
    parser.add_argument("--checkpoint", help="as of inference.tokenize; default: an untrained tokenizer on --encoder")
    parser.add_argument("--encoder", choices=list(DINOV2), default="base", help="DINOv2 size, at 224; default: base")
    parser.add_argument("--codes", type=int, default=8192, help="codebook size with --encoder; default: 8192")
    parser.add_argument("--data", help="folder of images; default: 500 x 375 JPEGs of the shipped photographs")
    parser.add_argument("--batch", type=int, default=tokenize.ROWS, help=f"images; default: {tokenize.ROWS}")
    parser.add_argument("--limit", type=int, help="the first so many images only")
    parser.add_argument("--threads", type=int, default=4, help="that read and crop; default: 4")
    parser.add_argument("--rounds", type=int, default=3, help="the best of so many counts; default: 3")
    return parser.parse_args(arguments)


def untrained(encoder: str, codes: int) -> Tokenizer:
    """A tokenizer on DINOv2 of size `encoder` at 224 pixels, with random weights: speed does not depend on them."""
    width, depth, heads = DINOV2[encoder]
    architecture = {
        "model_type": "dinov2", "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads,
        "patch_size": 14, "image_size": 224,
    }  # fmt: skip
    config = ModelConfig(
        encoder_config_path=None, encoder_params={"architecture": architecture}, encoder_input_size=224,
        decoder_config_path="ViT-Nano", num_embeddings=codes,
    )  # fmt: skip
    built = build_tokenizer(config)
    variables = initial_variables(built, jax.random.key(0), ["encoder", "quantizer", "decoder"])
    return Tokenizer(built.module, variables, config)


def prepare(args: argparse.Namespace, tokenizer: Tokenizer) -> tuple[dict[str, Callable[[], float]], int]:
    """The ways, each as a call that gives its seconds, everything compiled; and the images that each of them does."""
    source = tokenize.find_source(args)
    batches, size = min(len(source), args.limit or len(source)) // args.batch, tokenizer.image_size
    if not batches:
        raise ConfigError(f"--data holds {len(source)} images, --batch={args.batch} wants more: give a smaller one")
    plan = tokenize.make_plan(args, tokenizer, batches * args.batch)
    picture = np.random.default_rng(0).integers(0, 256, (args.batch, size, size, 3), np.uint8)
    there = jax.device_put(picture)
    program = jax.jit(lambda v, x: tokenizer.function("encode_to_indices")(v, x.astype(np.float32) / 255))

    def bare() -> None:
        jax.block_until_ready([program(tokenizer.variables, there) for _ in range(batches)])

    def read() -> None:
        starts = list(range(0, plan.images, args.batch))
        for _ in pipeline.ordered_batches(source, starts, args.batch, size, plan.views, args.threads, Skipped()):
            pass

    def host() -> None:
        for _ in tokenizer.stream("encode_to_indices", (picture for _ in range(batches))):
            pass

    def whole() -> None:
        with tempfile.TemporaryDirectory(dir=args.output) as output:
            missing = codes.start_dataset(output, plan)
            tokenize.write_shards(tokenizer, source, plan, missing, output, args.batch, args.threads)
            codes.finish_dataset(output, plan)

    jax.block_until_ready(program(tokenizer.variables, there))
    list(tokenizer.stream("encode_to_indices", [picture]))
    ways = {BARE: bare, READ: read, HOST: host, WHOLE: whole}
    return {name: _timed(way) for name, way in ways.items()}, plan.images


def _timed(way: Callable[[], Any]) -> Callable[[], float]:
    def seconds() -> float:
        start = time.perf_counter()
        way()
        return time.perf_counter() - start

    return seconds
