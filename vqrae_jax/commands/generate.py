"""Samples images from a generator: image files, a grid, or an .npz as ADM's evaluation reads it.

vqrae generate --checkpoint=runs/generator --classes=cat,1 --count=16 --output=samples

The output folder also has the codes of the samples in codes/, as `vqrae tokenize` writes them. The same command
continues after an interruption, and several processes share the work as those of tokenize do.
"""

import argparse
import ast
import concurrent.futures
import dataclasses
import functools
import itertools
import pathlib
import zipfile
from collections.abc import Iterable, Sequence
from typing import Any, get_args

import numpy as np

from vqrae_jax import distributed, storage
from vqrae_jax.commands import command_line
from vqrae_jax.data import codes, images
from vqrae_jax.errors import ConfigError, DataError
from vqrae_jax.evaluation import visualize
from vqrae_jax.generation.sampler_config import Method, SamplerConfig
from vqrae_jax.inference import samples
from vqrae_jax.inference.generator import Generator
from vqrae_jax.progress import progress

THREADS = 4  # that compress images
GRID = 64  # most images of the grid
parser = command_line.Parser("generate", "Samples images from a generator.")
parser.add("--checkpoint", "workdir, checkpoint or saved folder of a generator, or a hub id", required=True)
parser.add("--step", "step of the checkpoint; the newest by default", type=int)
parser.add("--tokenizer", "tokenizer of the codes, in place of the one in the generator's config")
parser.add("--classes", "names or numbers of classes, separated by commas; by default all, or none without classes")
parser.add_count("--count", "number of images", 16)
parser.add("--output", "folder for the images and their codes", required=True)
parser.add(
    "--format", "format of the image files; none: no files", default="png", choices=["png", "jpg", "webp", "none"]
)
parser.add("--grid", f"file name of a picture of the first {GRID} images, in the output folder", default="grid.png")
parser.add("--strip", "file name of a picture of the first image after steps of masked diffusion, in the output folder")
parser.add("--npz", "file name of an .npz of all images (arr_0) and labels (arr_1), in the output folder")
parser.add_count("--seed", "seed of the samples", 0, 2**32 - 1, least=0)
parser.add_count("--batch", "images per call of the network; 32 per device by default", limit=command_line.MAX_BATCH)
parser.add(
    "--guidance", "scale of classifier-free guidance; this and the next are the generator's by default", type=float
)
parser.add("--steps", "calls of a masked network", type=int)
parser.add("--method", "order in which hidden codes become visible", choices=get_args(Method))
parser.add("--set", "other setting of the sampler, see docs/generate.md; repeatable", action="append", default=[],
           metavar="NAME=VALUE")  # fmt: skip
parser.add_processes()


ARGUMENTS = {name: f"--{name}" for name in ("guidance", "steps", "method", "seed", "tokenizer", "checkpoint")}
ARGUMENTS |= {"labels": "--classes", "batch_size": "--batch", "step": "--step"}


@command_line.names_arguments(ARGUMENTS)
def generate(args: argparse.Namespace) -> bool:
    """Runs the command; returns whether all samples are complete, which those of other processes may not be."""
    process, processes = command_line.process_share(args)
    pictures = tuple(images.SAVE_OPTIONS)
    for name, suffixes in {"npz": (".npz",), "grid": pictures, "strip": pictures}.items():
        _check_name(f"--{name}", getattr(args, name), suffixes)
    output = command_line.output_folder(args.output)
    _check_output(output, args.output)
    generator = Generator.load(args.checkpoint, args.step, tokenizer=args.tokenizer, batch_size=args.batch)
    generator.require_tokenizer()
    settings = dict(_parse_setting(text) for text in args.set)
    arguments = {name: getattr(args, name) for name in ("guidance", "steps", "method")}
    settings |= {name: value for name, value in arguments.items() if value is not None}
    sampler = generator.choose_sampler(**settings)
    if args.strip and generator.module.config.blocks.causal:
        message = "shows steps of masked diffusion, but the generator is autoregressive; leave it out"
        raise ConfigError(message, field="--strip", value=args.strip)
    labels = _labels(generator, args.classes, args.count)
    plan = samples.plan_samples(generator, labels, args.seed, sampler)
    write = functools.partial(_write_images, generator, output, args.format)
    counts = samples.write_samples(
        generator, output / "codes", plan, labels, args.seed, sampler, process, processes, write
    )
    for _ in progress(counts, len(labels), "images", lambda count: count):
        pass
    if not codes.is_complete(output / "codes"):
        print("other processes are not done: the last one completes the samples")
        return False
    _write_missing(generator, output, args.format)
    _write_summary(generator, output, labels, args.grid, args.npz)
    if args.strip:
        write_steps(generator, output / args.strip, labels, args.seed, sampler)
    print(f"{len(labels)} images in {output}")
    return True


def _check_output(output: storage.Path, name: str) -> None:
    """Raises DataError if the folder has files of anything else, such as a run; an earlier output has a manifest."""
    with storage.convert_errors(output, "read"):
        files = {path.name for path in output.iterdir()} - {"codes"} if output.is_dir() else set()
        if files and not (output / "codes" / codes.MANIFEST).is_file():
            message = f"has other files, such as {min(files)}; choose an empty folder, or an output of this command"
            raise DataError(message, field="--output", value=name)


def _check_name(argument: str, name: str | None, suffixes: tuple[str, ...]) -> None:
    """Raises ConfigError unless a file in the output folder can have the name; None and "" are no file."""
    if name and (pathlib.PurePath(name).name != name or not name.lower().endswith(suffixes)):
        message = f"expected a file name that ends with {' or '.join(suffixes)}; it is in the folder --output"
        raise ConfigError(message, field=argument, value=name)


def _parse_setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ConfigError("expected NAME=VALUE", field="--set", value=text)
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # the name of a schedule


def _labels(generator: Generator, classes: str | None, count: int) -> np.ndarray:
    if classes is None:
        return samples.class_labels(generator.config.classes, count)
    numbers = generator.find_labels([name.strip() for name in classes.split(",")])
    return numbers[np.arange(count) % len(numbers)]


def _write_images(
    generator: Generator, output: storage.Path, format: str, rows: Sequence[int], sampled: np.ndarray, *_: np.ndarray
) -> None:
    if format == "none":
        return
    decoded = visualize.to_uint8(generator.tokenizer.decode_from_indices(sampled))
    paths = [output / f"{i:08d}.{format}" for i in rows]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as disk:
        list(disk.map(images.write_image, paths, decoded))


def _write_missing(generator: Generator, output: storage.Path, format: str) -> None:
    """Writes images that do not exist although their codes do: an earlier run had another format, or none."""
    dataset, written = codes.Codes(output / "codes", cached=2), {path.name for path in output.iterdir()}
    rows = [i for i in range(len(dataset)) if f"{i:08d}.{format}" not in written] if format != "none" else []
    for start in range(0, len(rows), generator.batch_size):
        part = rows[start : start + generator.batch_size]
        _write_images(generator, output, format, part, np.stack([dataset[i]["codes"] for i in part]))


def _write_summary(
    generator: Generator, output: storage.Path, labels: np.ndarray, grid: str | None, npz: str | None
) -> None:
    """Writes the grid of the first images, and the .npz of all."""
    count, shape = len(labels), (len(labels), *[generator.tokenizer.image_size] * 2, 3)
    decoded = functools.partial(samples.decode_samples, generator, output / "codes", generator.batch_size)
    if grid:
        first = np.concatenate(list(itertools.islice(decoded(), -(-GRID // generator.batch_size))))[:GRID]
        names = (
            [generator.class_name(label) for label in labels[: len(first)].tolist()]
            if generator.config.classes
            else None
        )
        images.write_image(output / grid, visualize.sample_grid(first, names))
    if npz:
        batches = progress(decoded(), count, f"images to {npz}", len)
        with storage.stage_output(output / npz) as local:
            write_npz(local, shape, batches, labels)


def write_steps(
    generator: Generator, path: storage.Path, labels: np.ndarray, seed: int, sampler: SamplerConfig
) -> None:
    """Writes a picture of the steps of the first sample."""
    label = None if labels[0] == generator.config.classes else labels[0]
    settings = dataclasses.asdict(sampler)
    history = generator.history(label, seed, sampler=settings.pop("method"), **settings)[:, 0]
    tokenizer, K = generator.tokenizer, generator.config.num_embeddings
    images.write_image(path, visualize.sampling_steps(history, K, tokenizer.decode_from_indices, tokenizer.grid))


def write_npz(path: Any, shape: tuple[int, ...], batches: Iterable[np.ndarray], labels: np.ndarray) -> None:
    """Writes images uint8 `shape` (arr_0), batch by batch, and labels (arr_1) to a file that np.load reads."""
    with storage.replace_file(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for batch in batches:
                file.write(np.ascontiguousarray(batch).tobytes())
        with archive.open("arr_1.npy", "w") as file:
            np.save(file, labels.astype(np.int64))


def _connect_and_generate(args: argparse.Namespace) -> None:
    if args.processes is None:
        distributed.connect()  # must precede the first use of a device
    generate(args)


main = command_line.build_main(parser, _connect_and_generate)

if __name__ == "__main__":
    main()
