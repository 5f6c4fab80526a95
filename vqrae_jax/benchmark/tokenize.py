"""Tokenizing a folder of images, read from and written to disk, against the bare encoder and search."""

import argparse
import tempfile
import time

import jax
import numpy as np

from vqrae_jax.data import codes
from vqrae_jax.inference import tokenize
from vqrae_jax.inference.tokenizer import Tokenizer

REPEATS = 3


def main(arguments: list[str]) -> None:
    """Prints images per second of both, the best of some repetitions in turns, and their ratio."""
    parser = argparse.ArgumentParser(prog="python -m vqrae_jax.benchmark tokenize", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="as of inference.tokenize")
    parser.add_argument("--data", required=True, help="folder of images")
    parser.add_argument("--batch", type=int, default=tokenize.ROWS, help="images")
    parser.add_argument("--limit", type=int, help="the first so many images only")
    parser.add_argument("--threads", type=int, default=4, help="that read and crop")
    given = parser.parse_args(arguments)
    batch = ["--batch", str(given.batch), "--shard-size", str(8 * given.batch), "--threads", str(given.threads)]
    limit = ["--limit", str(given.limit)] if given.limit else []
    args = ["--checkpoint", given.checkpoint, "--data", given.data, "--output", "-", *batch, *limit]
    bare, whole, images = measure(tokenize.parse(args))
    print(f"encoder and search alone: {images / bare:.1f} images per second; from disk to disk: {images / whole:.1f}")
    print(f"ratio {whole / bare:.3f}, {images} images in batches of {given.batch}")


def measure(args: argparse.Namespace) -> tuple[float, float, int]:
    """Seconds of the bare program and of the command for the same number of images, and that number."""
    tokenizer = Tokenizer.load(args.checkpoint)
    source = tokenize.find_source(args)
    plan = tokenize.make_plan(args, tokenizer, len(source))
    batches = -(-plan.images // args.batch)
    size = tokenizer.image_size
    picture = np.random.default_rng(0).integers(0, 256, (args.batch, size, size, 3), np.uint8)
    program = jax.jit(lambda v, x: tokenizer.function("encode_to_indices")(v, x.astype(np.float32) / 255))
    there = jax.device_put(picture)
    jax.block_until_ready(program(tokenizer.variables, there))
    list(tokenizer.stream("encode_to_indices", [picture]))
    bare = whole = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(batches):
            last = program(tokenizer.variables, there)
        jax.block_until_ready(last)
        bare = min(bare, time.perf_counter() - start)
        with tempfile.TemporaryDirectory(prefix="vqrae-jax-") as output:
            start = time.perf_counter()
            missing = codes.begin(output, plan)
            tokenize.write_shards(tokenizer, source, plan, missing, output, args.batch, args.threads)
            codes.finish(output, plan)
            whole = min(whole, time.perf_counter() - start)
    return bare, whole, batches * args.batch
