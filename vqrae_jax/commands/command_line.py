"""The parts that all commands share: arguments, error messages and exit codes.

Exit codes: 0 success, 1 files or other resources that cannot be used, 2 invalid arguments or settings, 130 interrupted.
Errors are one line on standard error; a bug keeps its traceback.
"""

import argparse
import contextlib
import functools
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, get_args

from vqrae_jax import distributed, runtime, storage
from vqrae_jax.config import DataConfig, EncoderClass, ImageSource, from_dict
from vqrae_jax.errors import ConfigError, DataError, UserError, report_errors

MAX_BATCH = 65_536  # images; absurd numbers are refused before they become memory or threads

SOURCES = get_args(ImageSource)
DATA_ARGUMENTS = {  # by the config fields that they set
    "data.eval_path": "--data", "data.path": "--data", "data.source": "--source", "data.name": "--name",
    "data.eval_split": "--split", "data.image_key": "--image-key", "data.label_key": "--label-key",
    "data.max_pixels": "--max-pixels",
}  # fmt: skip


def build_main(
    parser: argparse.ArgumentParser, action: Callable[[argparse.Namespace], Any], level: int = logging.INFO
) -> Callable[..., None]:
    """Returns the `main(argv=None)` of a command."""
    return lambda argv=None: run(lambda: action(parser.parse_args(argv)), level)


def run(action: Callable[[], Any], level: int = logging.INFO) -> None:
    """Runs a command in a prepared process; exits with an error message and code unless it succeeds."""
    with report_errors(), runtime.log_lines(level):
        runtime.start()
        action()


class Parser(argparse.ArgumentParser):
    """The parser of `vqrae NAME`; a leading ~ of an argument becomes the home folder, as shells expand few of them."""

    def __init__(self, name: str, description: str):
        super().__init__(prog=f"vqrae {name}", description=description)
        self.register("type", None, os.path.expanduser)  # arguments without a type

    def add(self, name: str, help: str = "", **options: Any) -> None:
        """Adds an argument; its default, if it has one, becomes part of the help."""
        if options.get("default") is not None:
            help += f"{'; ' if help else ''}default: %(default)s"
        self.add_argument(name, help=help, **options)

    def add_count(
        self, name: str, help: str, default: int | None = None, limit: int = 10**9, least: int = 1, **options: Any
    ) -> None:
        """Adds an argument that is an integer from `least` to `limit`."""
        self.add(name, help, default=default, type=functools.partial(count, limit=limit, least=least), **options)

    def add_checkpoint(self, required: bool = True, **options: Any) -> None:
        """Adds --checkpoint, --step and --encoder, the arguments of `Tokenizer.load`."""
        places = "workdir of a run, one of its checkpoints, an exported folder (each local or gs://), or a hub id"
        self.add("--checkpoint", places, required=required, **options)
        self.add("--step", "step of the checkpoint; the newest by default", type=int)
        self.add("--encoder", "folder or hub id of the frozen encoder's weights, in place of the config's")

    def add_data(self) -> None:
        """Adds --data, --source and more, which name images as the data section of a config does."""
        self.add("--data", "images: a folder, or the value of data.path for another --source")
        self.add("--source", ", ".join(SOURCES), default="folder")
        self.add("--name", "value of data.name, for sources that need it")
        self.add("--split", "split of a dataset that has splits", default="train")
        self.add("--image-key", "value of data.image_key: the member, column or feature with images")
        self.add("--label-key", "value of data.label_key")
        self.add_max_pixels()

    def add_max_pixels(self) -> None:
        """Adds --max-pixels, the value of data.max_pixels."""
        self.add_count("--max-pixels", "largest number of pixels of an image", DataConfig().max_pixels)

    def add_encoder_class(self, field: str) -> None:
        """Adds --encoder-cls, which sets a config field."""
        choices = get_args(EncoderClass)
        self.add("--encoder-cls", f"value of {field}", default=choices[0], choices=choices, metavar="ENCODER_CLS")

    def add_encoder_dtype(self) -> None:
        """Adds --encoder-dtype, an argument of `Tokenizer.load` that decides codes."""
        text, choices = "bfloat16: faster on TPUs and GPUs, with other codes", ["float32", "bfloat16"]
        self.add("--encoder-dtype", text, default=choices[0], choices=choices)

    def add_processes(self) -> None:
        """Adds --process and --processes, see `process_share`."""
        text = "number of processes; by default those of the TPU pod, SLURM or Open MPI job"
        self.add("--processes", text, type=int)
        self.add("--process", "index of this process, from 0", type=int)

    def add_batch_and_limit(self, batch: int) -> None:
        self.add_count("--batch", "images per batch", batch, MAX_BATCH)
        self.add_count("--limit", "use the first LIMIT images only")


def process_share(args: argparse.Namespace) -> tuple[int, int]:
    """Returns index and number of the processes that share the work, from `add_processes` or the cluster."""
    process, processes = args.process, args.processes
    if (process is None) != (processes is None):
        raise ConfigError("--process and --processes need each other; pass both or none", field="--process")
    if processes is None:
        process, processes = distributed.process_index(), distributed.process_count()
    if not 0 <= process < processes:
        raise ConfigError(f"must be less than --processes={processes}", field="--process", value=process)
    return process, processes


def count(text: str, limit: int = 10**9, least: int = 1) -> int:
    """Returns the integer from `least` to `limit` that an argument is; a `type` of argparse."""
    if text.isdecimal() and len(text) < 20 and least <= int(text) <= limit:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r}: expected an integer from {least} to {limit}")


def short_names(paths: Sequence[str]) -> list[str]:
    """Returns the last parts of paths, or whole paths if two of those are equal."""
    last = [os.path.basename(os.path.abspath(path)) for path in paths]
    return last if len(set(last)) == len(last) else list(paths)


def output_folder(name: str, field: str = "--output") -> storage.Path:
    """Returns the path of an output folder, whatever dots its name has; DataError if it is a file."""
    path = storage.resolve_path(name)
    _check_folder(path, name, field)
    return path


def _check_folder(path: storage.Path, name: str, field: str) -> None:
    """Raises DataError if a local folder, or the nearest one above it that exists, is a file or not writable."""
    if storage.is_remote(path):
        return
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        problem = "is not writable; choose another folder" if existing.is_dir() else "is a file; expected a folder"
        raise DataError(f"{existing} {problem}", field=field, value=name)


def output_file(name: str, suffixes: Collection[str] = (), field: str = "--output") -> storage.Path:
    """Returns the path of an output file; raises a UserError for a folder, or for another suffix than `suffixes`."""
    path = storage.resolve_path(name)
    if not storage.is_remote(path) and path.is_dir():
        raise DataError("is a folder; expected the name of a file", field=field, value=name)
    _check_folder(path.parent, name, field)
    if suffixes and path.suffix.lower() not in suffixes:
        raise ConfigError(f"its suffix must be one of {', '.join(suffixes)}", field=field, value=name)
    return path


def data_config(args: argparse.Namespace, **fields: Any) -> DataConfig:
    """Returns the arguments of `add_data` as validation data, with other fields of the data section."""
    if args.source not in SOURCES:
        raise ConfigError(f"expected one of {', '.join(SOURCES)}", field="--source", value=args.source)
    if not args.data and args.source not in ("photographs", "tfds"):
        raise ConfigError(f"is missing, but --source={args.source} needs it", field="--data")
    if not args.split:
        raise ConfigError("name a split of the dataset", field="--split", value=args.split)
    values = {"source": args.source, "path": args.data, "eval_path": args.data, "name": args.name}
    values |= {"image_key": args.image_key, "label_key": args.label_key, "max_pixels": args.max_pixels}
    return from_dict(DataConfig, values | {"eval_split": args.split} | fields)


@contextlib.contextmanager
def names_arguments(arguments: Mapping[str, str] = DATA_ARGUMENTS) -> Iterator[None]:
    """Reports errors in config fields as errors in the arguments that set them; a decorator or a context."""
    try:
        yield
    except UserError as error:
        raise error.renamed(arguments) from error.__cause__
