"""Compares tokenizing a folder of images from disk to disk with the bare program.

python benchmarks/tokenize_folder.py

The same batches are processed in four ways, in turns: the compiled program on images in the device's memory; reading
and cropping alone; arrays in memory through the tokenizer, which adds the work of the host between batches; and the
whole command from disk to disk. The command can only be as fast as the slower of the first two ways, and on a CPU
reading takes time from the encoder.
"""

import argparse
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # the checkout

import jax
import numpy as np

from benchmarks.training_input import write_photographs
from vqrae_jax.benchmark.machine import format_machine
from vqrae_jax.benchmark.stages import DINOV2
from vqrae_jax.build.tokenizer import build_tokenizer, initial_variables
from vqrae_jax.commands import command_line, tokenize
from vqrae_jax.commands.command_line import count
from vqrae_jax.config import ModelConfig
from vqrae_jax.data import codes, pipeline
from vqrae_jax.data.readable import Skipped
from vqrae_jax.errors import ConfigError
from vqrae_jax.inference.tokenizer import Tokenizer

PROGRAM, READ, MEMORY, DISK = "encoder and search alone", "reading alone", "from memory", "from disk to disk"


def main(arguments: list[str]) -> None:
    """Prints a Markdown table: the best images per second of each way, and its time relative to the first."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="vqrae-jax-") as scratch:
        folder = options.data or write_photographs(pathlib.Path(scratch), options.limit or 256)
        batch = ["--batch", str(options.batch), "--shard-size", str(8 * options.batch)]
        limit = ["--limit", str(options.limit)] if options.limit else []
        args = tokenize.parser.parse_args(
            ["--checkpoint=-", "--data", folder, "--output", scratch, f"--threads={options.threads}", *batch, *limit]
        )
        tokenizer = Tokenizer.load(options.checkpoint) if options.checkpoint else build_random_tokenizer(options)
        ways, images = prepare(args, tokenizer)
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(options.rounds):
            best = {name: min(best[name], time_way()) for name, time_way in ways.items()}
    print(
        f"{format_machine()}\n\n{images} images in batches of {options.batch}, {tokenizer.image_size} pixels; the best "
        f"of {options.rounds} rounds\n\n"
        "| way | images per second | time / program |\n| --- | --- | --- |"
    )
    for name, seconds in best.items():
        print(f"| {name} | {images / seconds:.1f} | {seconds / best[PROGRAM]:.3f} |")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="workdir, exported folder or hub id; default: random weights")
    parser.add_argument("--encoder", choices=list(DINOV2), default="base", help="DINOv2 size, at 224; default: base")
    parser.add_argument("--codes", type=count, default=8192, help="codebook size with --encoder; default: 8192")
    parser.add_argument("--data", help="folder of images; default: 500 x 375 crops of the shipped photographs")
    parser.add_argument("--batch", type=count, default=tokenize.VIEWS, help="images per batch; default: %(default)s")
    parser.add_argument("--limit", type=count, help="number of images; default: all")
    parser.add_argument("--threads", type=count, default=4, help="threads that read and crop; default: 4")
    parser.add_argument("--rounds", type=count, default=3, help="number of measurements, of which the best counts")
    return parser.parse_args(arguments)


def build_random_tokenizer(options: argparse.Namespace) -> Tokenizer:
    """Builds a tokenizer on DINOv2 at 224 pixels with random weights: speed does not depend on them."""
    width, depth, heads = DINOV2[options.encoder]
    architecture = {
        "model_type": "dinov2", "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads,
        "patch_size": 14, "image_size": 224,
    }  # fmt: skip
    config = ModelConfig(
        encoder_config_path=None, encoder_params={"architecture": architecture}, encoder_input_size=224,
        decoder_config_path="ViT-Nano", num_embeddings=options.codes,
    )  # fmt: skip
    built = build_tokenizer(config)
    variables = initial_variables(built, jax.random.key(0), ["encoder", "quantizer", "decoder"])
    return Tokenizer(built.module, variables, config)


@command_line.names_arguments()
def prepare(args: argparse.Namespace, tokenizer: Tokenizer) -> tuple[dict[str, Callable[[], float]], int]:
    """Compiles everything.

    Returns:
      A function per way that runs it and returns its seconds, and the number of images that each processes.
    """
    source = pipeline.evaluation_source(command_line.data_config(args))
    batches, size = min(len(source), args.limit or len(source)) // args.batch, tokenizer.image_size
    if not batches:
        raise ConfigError(f"must be at most {len(source)}, the number of images", field="--batch", value=args.batch)
    plan = tokenize.build_plan(args, tokenizer, batches * args.batch)
    images = np.random.default_rng(0).integers(0, 256, (args.batch, size, size, 3), np.uint8)
    on_device = jax.device_put(images)
    program = jax.jit(lambda v, x: tokenizer.function("encode_to_indices")(v, x.astype(np.float32) / 255))

    def run_program() -> None:
        jax.block_until_ready([program(tokenizer.variables, on_device) for _ in range(batches)])

    def read() -> None:
        starts = list(range(0, plan.images, args.batch))
        for _ in pipeline.ordered_batches(source, starts, args.batch, size, plan.views, args.threads, Skipped()):
            pass

    def encode_from_memory() -> None:
        for _ in tokenizer.stream("encode_to_indices", (images for _ in range(batches))):
            pass

    def run_command() -> None:
        with tempfile.TemporaryDirectory(dir=args.output) as output:
            missing = codes.start_dataset(output, plan)
            tokenize.write_shards(tokenizer, source, plan, missing, output, args.batch, args.threads)
            codes.finish_dataset(output, plan)

    jax.block_until_ready(program(tokenizer.variables, on_device))
    list(tokenizer.stream("encode_to_indices", [images]))
    ways = {PROGRAM: run_program, READ: read, MEMORY: encode_from_memory, DISK: run_command}
    return {name: _timed(way) for name, way in ways.items()}, plan.images


def _timed(function: Callable[[], Any]) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    return run


if __name__ == "__main__":
    command_line.run(lambda: main(sys.argv[1:]))
