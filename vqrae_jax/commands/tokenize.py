"""python -m vqrae_jax.commands.tokenize --checkpoint=runs/quickstart --data=/data/train --output=/data/codes

A dataset -> shards of codes with labels and ids, and manifest.json with the tokenizer's hash, counts and checksums.
`vqrae_jax.data.codes.Codes` reads them, and what reads the format elsewhere. Interrupted in any way, the same command
goes on where it stopped. Which process writes a shard changes nothing in it.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from vqrae_jax import distributed, sharding
from vqrae_jax.commands import command_line as command
from vqrae_jax.commands import data_arguments as data_flags
from vqrae_jax.data import code_shards, codes, pipeline
from vqrae_jax.data.images import VIEWS
from vqrae_jax.data.readable import Skipped
from vqrae_jax.errors import ConfigError
from vqrae_jax.inference.tokenizer import Tokenizer

ROWS = 32  # pictures of a batch per device
SHARD = 4096  # images
NAMED = 5  # skipped images that are named


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vqrae_jax.commands.tokenize",
        description="Turns a dataset into shards of codes with labels and ids. Run it again to go on after a stop.",
    )
    parser.add_argument("--checkpoint", required=True, help=command.CHECKPOINT)
    parser.add_argument("--step", type=int, help="checkpoint step; the newest by default")
    data_flags.add(parser)
    parser.add_argument("--output", required=True, help="folder for the codes")
    parser.add_argument("--format", default="npz", choices=list(code_shards.SUFFIXES), help="default: npz")
    parser.add_argument(
        "--views",
        default="one",
        choices=list(VIEWS),
        help="codes per image: central crop, also mirrored, ten; default: %(default)s",
    )
    parser.add_argument("--limit", type=command.at_least_1, help="the first so many images only")
    parser.add_argument(
        "--shard-size", type=command.at_least_1, default=SHARD, help=f"images per shard; default: {SHARD}"
    )
    parser.add_argument("--batch", type=command.at_least_1, help=f"images per batch; default: {ROWS} views per device")
    parser.add_argument("--threads", type=command.at_least_1, default=4, help="that read and crop; default: 4")
    parser.add_argument(
        "--processes", type=int, help="how many share the work; default: those of the TPU pod, SLURM or Open MPI job"
    )
    parser.add_argument("--process", type=int, help="the number of this one, from 0")
    return parser.parse_args(argv)


@data_flags.told()
def tokenize(args: argparse.Namespace) -> dict[str, Any] | None:
    """Runs the command; returns the manifest, or None where other processes are not done yet.

    Raises:
      DataError, ConfigError, CheckpointError, WeightsError, DataError: before any image is encoded.
    """
    _check(args)
    process, processes = args.process, args.processes
    if processes is None:
        process, processes = distributed.process_index(), distributed.process_count()
    source = find_source(args)
    devices = jax.local_devices()
    mesh = sharding.make_mesh(devices=devices) if len(devices) > 1 else None
    tokenizer = Tokenizer.load(args.checkpoint, args.step, mesh=mesh)
    plan = make_plan(args, tokenizer, len(source))
    plan = dataclasses.replace(plan, listing=source.hash_listing(plan.images))
    batch = args.batch or _batch(plan.views, len(devices))
    # Of what nobody has chosen, the last batch of a shard is filled up by images that are not counted: the shards of
    # three devices are those of four.
    chosen = args.batch is not None or args.shard_size != SHARD
    if chosen and args.shard_size % batch:
        raise ConfigError(
            f"--shard-size={args.shard_size} is no multiple of the batch of {batch} images: "
            f"give {-(-args.shard_size // batch) * batch}, or another --batch"
        )
    missing = codes.start_dataset(args.output, plan)
    mine = [shard for shard in missing if shard % processes == process]
    if mine:
        write_shards(tokenizer, source, plan, mine, args.output, batch, args.threads)
    manifest = codes.finish_dataset(args.output, plan, source.key)
    _report(args, plan, manifest, len(mine), source)
    return manifest


def write_shards(
    tokenizer: Tokenizer, source: Any, plan: codes.Plan, shards: list[int], output: str, batch: int, threads: int
) -> None:
    """Encodes and writes `shards`. Reading, the device and the disk work at the same time.

    Args:
      source: of `pipeline.evaluation_source`.
      output: folder, for which `codes.start_dataset` was called.
      batch: images per batch; one ends with its shard, so that a divisor of the plan's shard size wastes nothing.
      threads: that read and crop.
    """
    total = sum(_length(plan, shard) for shard in shards)
    encoded = _encode(tokenizer, source, plan, shards, batch, threads)
    with concurrent.futures.ThreadPoolExecutor(1) as disk:
        writing = None
        for shard, columns in command.progress(encoded, total, "images", lambda item: _length(plan, item[0])):
            if writing is not None:
                writing.result()
            writing = disk.submit(codes.write_shard, output, plan, shard, columns)
        if writing is not None:
            writing.result()


def find_source(args: argparse.Namespace) -> Any:
    return pipeline.evaluation_source(data_flags.data_config(args))


def _check(args: argparse.Namespace) -> None:
    if (args.process is None) != (args.processes is None):
        raise ConfigError(f"--process={args.process} --processes={args.processes}: give both or none")
    if args.processes is not None and not 0 <= args.process < args.processes:
        raise ConfigError(f"--process={args.process} of --processes={args.processes}: they count from 0")


def make_plan(args: argparse.Namespace, tokenizer: Tokenizer, images: int) -> codes.Plan:
    """What the command will write, for a source of so many images."""
    views = len(VIEWS[args.views](np.zeros((1, 1, 3), np.uint8), 1))
    described = {"source": args.source, "path": args.data, "name": args.name, "split": args.split}
    if args.source == "folder":
        del described["split"]
    return codes.Plan(
        tokenizer=tokenizer.hash,
        source=" ".join(f"{name}={value}" for name, value in described.items() if value),
        images=min(images, args.limit or images),
        views=args.views,
        code_shape=(*((views,) if views > 1 else ()), *tokenizer.code_shape),
        code_dtype=tokenizer.code_dtype.name,
        codebook_size=tokenizer.codebook_size,
        image_size=tokenizer.image_size,
        format=args.format,
        shard_size=args.shard_size,
    )


def _batch(views: str, devices: int) -> int:
    """Images per batch: a power of two, of about ROWS pictures per device."""
    pictures = len(VIEWS[views](np.zeros((1, 1, 3), np.uint8), 1))
    return devices << max((ROWS // pictures).bit_length() - 1, 0)


def _length(plan: codes.Plan, shard: int) -> int:
    start, stop = plan.image_range(shard)
    return stop - start


def _encode(
    tokenizer: Tokenizer, source: Any, plan: codes.Plan, shards: list[int], batch: int, threads: int
) -> Iterator[tuple[int, code_shards.Columns]]:
    """The content of each shard."""
    starts = [start for shard in shards for start in range(*plan.image_range(shard), batch)]
    batches = pipeline.ordered_batches(source, starts, batch, plan.image_size, plan.views, threads, Skipped())
    known = collections.deque()

    def pictures() -> Iterator[np.ndarray]:
        for read in batches:
            image = read.pop("image")
            known.append(read)
            yield image.reshape(-1, *image.shape[2:])

    parts: list[code_shards.Columns] = []
    for indices in tokenizer.stream("encode_to_indices", pictures()):
        read = known.popleft()
        first, shard = read["first"], read["first"] // plan.shard_size
        stop = plan.image_range(shard)[1]
        kept = np.flatnonzero(read["mask"] & (first + np.arange(batch) < stop))
        grids = indices.reshape(batch, *plan.code_shape)[kept].astype(plan.code_dtype)
        ids = [source.key(first + int(i)) for i in kept]
        parts.append(code_shards.Columns(first + kept, ids, read["label"][kept], grids))
        if first + batch >= stop:
            yield shard, code_shards.concatenate(parts)
            parts = []


def _report(
    args: argparse.Namespace, plan: codes.Plan, manifest: dict[str, Any] | None, written: int, source: Any
) -> None:
    print(f"wrote {written} of {plan.shards} shards to {args.output}")
    if manifest is None:
        print("other processes are not done: the last one completes the manifest")
        return
    print(f"{manifest['count']} images of {plan.images}, codes {list(plan.code_shape)} {plan.code_dtype}")
    if skipped := manifest["skipped"]:
        shown = ", ".join(source.key(index) for index in skipped[:NAMED])
        rest = f" and more: all of them are in {codes.MANIFEST}" if len(skipped) > NAMED else ""
        print(f"skipped {len(skipped)} unreadable images: {shown}{rest}", file=sys.stderr)


def main() -> None:
    command.run(lambda: _main(parse()))


def _main(args: argparse.Namespace) -> None:
    if args.processes is None:
        distributed.connect()  # before any device is touched; on a pod none can be without it
    tokenize(args)


if __name__ == "__main__":
    main()
