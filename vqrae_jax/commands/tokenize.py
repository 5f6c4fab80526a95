"""Encodes a dataset to shards of codes with labels and ids.

vqrae tokenize --checkpoint=runs/quickstart --data=/data/train --output=/data/codes --format=parquet

`vqrae_jax.data.codes.Codes` reads the shards, and so do the usual readers of their format. After any interruption the
same command continues. The content of a shard does not depend on the process that writes it.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import os
import reprlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from vqrae_jax import distributed, sharding, storage
from vqrae_jax.build.generator import arrange_codes
from vqrae_jax.commands import command_line
from vqrae_jax.data import code_shards, codes, images, pipeline
from vqrae_jax.data.readable import Skipped
from vqrae_jax.errors import ConfigError, DataError
from vqrae_jax.inference.tokenizer import Tokenizer
from vqrae_jax.progress import progress

VIEWS = 32  # views per batch and device
SHARD = 4096  # images
LISTED = 5  # skipped images whose ids are printed

parser = command_line.Parser("tokenize", __doc__.partition("\n\n")[0])
parser.add_checkpoint()
parser.add_data()
parser.add("--classes", "numbering of the class folders: that of another folder, or of a dataset of codes")
parser.add("--output", "folder for the codes", required=True)
parser.add("--format", default="npz", choices=list(code_shards.SUFFIXES))
parser.add(
    "--views", "central crop, that and its mirror image, or ten crops", default="one", choices=list(images.VIEWS)
)
parser.add_count("--limit", "use the first LIMIT images only")
parser.add_count("--shard-size", "images per shard", SHARD)
parser.add_count("--batch", f"images per batch; {VIEWS} views per device by default", limit=command_line.MAX_BATCH)
parser.add_encoder_dtype()
parser.add_count("--threads", "threads that read and crop images", 4, 1024)
parser.add_processes()


@command_line.names_arguments()
def tokenize(args: argparse.Namespace) -> dict[str, Any] | None:
    """Runs the command; returns the manifest, or None while other processes are not done.

    Arguments, data and checkpoint are checked before anything is written.
    """
    process, processes = command_line.process_share(args)
    output = command_line.output_folder(args.output)
    classes = read_classes(args.classes) if args.classes else None
    source = pipeline.evaluation_source(command_line.data_config(args), classes)
    if classes and (unknown := source.classes[len(classes) :]):
        problem = f"lacks the class folders {reprlib.repr(unknown)} of --data; pass the folder that has all of them"
        raise DataError(problem, field="--classes", value=args.classes)
    devices = jax.local_devices()
    mesh = sharding.make_mesh(devices=devices) if len(devices) > 1 else None
    tokenizer = Tokenizer.load(
        args.checkpoint, args.step, encoder=args.encoder, mesh=mesh, encoder_dtype=args.encoder_dtype
    )
    plan = build_plan(args, tokenizer, len(source))
    plan = dataclasses.replace(plan, listing=source.listing(plan.images)["names"], classes=source.classes)
    # The default is a power of two of images per device, with at most VIEWS views in all.
    batch = args.batch or len(devices) << max((VIEWS // count_views(plan.views)).bit_length() - 1, 0)
    # By default the last batch of a shard is padded, so that shards do not depend on the number of devices.
    if (args.batch or args.shard_size != SHARD) and args.shard_size % batch:
        message = f"must be a multiple of {batch}, the images per batch"
        raise ConfigError(message, field="--shard-size", value=args.shard_size)
    shards = [shard for shard in codes.start_dataset(output, plan) if shard % processes == process]
    if shards:
        write_shards(tokenizer, source, plan, shards, output, batch, args.threads)
    manifest = codes.finish_dataset(output, plan, source.key)
    print(f"wrote {len(shards)} of {plan.shards} shards to {output}")
    if manifest is None:
        print("other processes are not done: the last one completes the manifest")
        return None
    print(f"{manifest['count']} images of {plan.images}, codes {list(plan.code_shape)} {plan.code_dtype}")
    if skipped := manifest["skipped"]:
        ids = ", ".join(source.key(index) for index in skipped[:LISTED])
        rest = f" and more, listed in {codes.MANIFEST}" if len(skipped) > LISTED else ""
        print(f"skipped {len(skipped)} unreadable images: {ids}{rest}", file=sys.stderr)
    return manifest


def read_classes(path: str) -> tuple[str, ...]:
    """Returns the names of the class folders in a folder, or of the classes in a dataset of codes, by their numbers."""
    folder = storage.resolve_path(path)
    classes = codes.read_plan(folder).classes if (folder / codes.MANIFEST).is_file() else None
    classes = classes or storage.list_folders(os.fspath(folder), "--classes")
    if not classes:
        raise DataError("has no class folders, or codes without names of classes", field="--classes", value=path)
    return tuple(classes)


def build_plan(args: argparse.Namespace, tokenizer: Tokenizer, images: int) -> codes.Plan:
    """Returns the description of the shards for a source of `images` images."""
    views = count_views(args.views)
    split = None if args.source == "folder" else args.split
    source = {"source": args.source, "path": args.data, "name": args.name, "split": split}
    return codes.Plan(
        tokenizer=tokenizer.hash,
        source=" ".join(f"{name}={value}" for name, value in source.items() if value),
        images=min(images, args.limit or images),
        views=args.views,
        code_shape=(*((views,) if views > 1 else ()), *tokenizer.code_shape),
        code_dtype=tokenizer.code_dtype.name,
        codebook_size=tokenizer.codebook_size,
        image_size=tokenizer.image_size,
        format=args.format,
        shard_size=args.shard_size,
        encoding=tokenizer.encoding,
        grids=arrange_codes(tokenizer.code_shape, tokenizer.module.quantizer.prefixes, tokenizer.grid)[0],
    )


def count_views(views: str) -> int:
    return len(images.VIEWS[views](np.zeros((1, 1, 3), np.uint8), 1))


def write_shards(
    tokenizer: Tokenizer,
    source: Any,
    plan: codes.Plan,
    shards: list[int],
    output: storage.Path,
    batch: int,
    threads: int,
) -> None:
    """Encodes and writes shards; reading (by `threads`), the device and the disk work at the same time."""
    with concurrent.futures.ThreadPoolExecutor(1) as disk:
        writing = disk.submit(lambda: None)
        for shard, columns in _encode_shards(tokenizer, source, plan, shards, batch, threads):
            writing.result()
            writing = disk.submit(codes.write_shard, output, plan, shard, columns)
        writing.result()


def _encode_shards(
    tokenizer: Tokenizer, source: Any, plan: codes.Plan, shards: list[int], batch: int, threads: int
) -> Iterator[tuple[int, code_shards.Columns]]:
    """Yields the number and content of each shard."""
    starts = [start for shard in shards for start in range(*plan.image_range(shard), batch)]
    batches = pipeline.ordered_batches(source, starts, batch, plan.image_size, plan.views, threads, Skipped())
    pending = collections.deque()  # the other columns of batches that are being encoded

    def views() -> Iterator[np.ndarray]:
        for columns in batches:
            image = columns.pop("image")
            pending.append(columns)
            yield image.reshape(-1, *image.shape[2:])

    parts: list[code_shards.Columns] = []
    encoded = tokenizer.stream("encode_to_indices", views())
    for indices in progress(encoded, len(starts), f"batches of {batch} images"):
        columns = pending.popleft()
        first, shard = columns["first"], columns["first"] // plan.shard_size
        stop = plan.image_range(shard)[1]
        valid = np.flatnonzero(columns["mask"] & (first + np.arange(batch) < stop))
        grids = indices.reshape(batch, *plan.code_shape)[valid].astype(plan.code_dtype)
        ids = [source.key(first + int(i)) for i in valid]
        parts.append(code_shards.Columns(first + valid, ids, columns["label"][valid], grids))
        if first + batch >= stop:
            yield shard, code_shards.concatenate(parts)
            parts = []


def _connect_and_tokenize(args: argparse.Namespace) -> None:
    if args.processes is None:
        distributed.connect()  # must precede the first use of a device
    tokenize(args)


main = command_line.build_main(parser, _connect_and_tokenize)

if __name__ == "__main__":
    main()
