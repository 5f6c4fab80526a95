"""What all commands share: their arguments, progress bar, error messages and exit codes.

Exit codes: 0 success, 1 files or other resources that cannot be used, 2 invalid arguments or settings, 130 interrupted.
Errors are one line on standard error; a bug keeps its traceback.
"""

import argparse
import contextlib
import io
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar, get_args

from vqrae_jax import runtime
from vqrae_jax.config import DataConfig, from_dict
from vqrae_jax.errors import ConfigError, UserError

T = TypeVar("T")

SOURCES = get_args(DataConfig.model_fields["source"].annotation)
DATA_ARGUMENTS = {  # by the config fields that they set
    "data.eval_path": "--data", "data.path": "--data", "data.source": "--source", "data.name": "--name",
    "data.eval_split": "--split",
}  # fmt: skip


def run(action: Callable[[], Any], level: int = logging.WARNING) -> None:
    """Runs a command in a prepared process; exits with an error message and code unless it succeeds."""
    logging.basicConfig(level=level, format="%(levelname)s %(message)s", force=True)  # libraries may have set it
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names need not be valid in the encoding of the terminal
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        runtime.start()
        action()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def build_parser(name: str, description: str) -> argparse.ArgumentParser:
    """Returns the parser of `vqrae NAME`."""
    return argparse.ArgumentParser(prog=f"vqrae {name}", description=description)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Adds --checkpoint and --step, the arguments of `Tokenizer.load`."""
    parser.add_argument(
        "--checkpoint", required=True,
        help="workdir of a run, one of its checkpoints, an exported folder (each local or gs://), or a hub id",
    )  # fmt: skip
    parser.add_argument("--step", type=int, help="step of the checkpoint; the newest by default")


def add_data(parser: argparse.ArgumentParser) -> None:
    """Adds --data, --source, --name and --split, which name images as the data section of a config does."""
    parser.add_argument("--data", help="images: a folder, or the value of data.path for another --source")
    parser.add_argument("--source", default="folder", help=f"{', '.join(SOURCES)}; default: folder")
    parser.add_argument("--name", help="value of data.name, for sources that need it")
    parser.add_argument("--split", default="train", help="split of a dataset that has splits; default: train")


def add_batch(parser: argparse.ArgumentParser, default: int) -> None:
    """Adds --batch."""
    parser.add_argument("--batch", type=positive, default=default, help="images per batch; default: %(default)s")


def add_limit(parser: argparse.ArgumentParser, default: int | None = None) -> None:
    """Adds --limit."""
    text = "all by default" if default is None else "default: %(default)s"
    parser.add_argument("--limit", type=positive, default=default, help=f"use the first LIMIT images only; {text}")


def positive(text: str) -> int:
    """Converts an argument to an integer of at least 1; argparse reports the name of the argument."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer of at least 1")
    return int(text)


def data_config(args: argparse.Namespace, **fields: Any) -> DataConfig:
    """Returns the arguments of `add_data` as validation data: in order, without anything random.

    Args:
      args: the parsed command line.
      fields: other fields of the data section.

    Raises:
      ConfigError: an unknown source, or --data or --split is missing.
    """
    if args.source not in SOURCES:
        raise ConfigError(f"expected one of {', '.join(SOURCES)}", field="--source", value=args.source)
    if args.data is None and args.source not in ("photographs", "tfds"):
        raise ConfigError(f"is missing, but --source={args.source} needs it", field="--data")
    if not args.split:
        raise ConfigError("name a split of the dataset", field="--split", value=args.split)
    values = {"source": args.source, "path": args.data, "eval_path": args.data, "name": args.name}
    return from_dict(DataConfig, values | {"eval_split": args.split} | fields)


@contextlib.contextmanager
def names_arguments(arguments: Mapping[str, str] = DATA_ARGUMENTS) -> Iterator[None]:
    """Reports errors in config fields as errors in the arguments that set them; a context or a decorator.

    Args:
      arguments: {config field: argument}.
    """
    try:
        yield
    except UserError as error:
        if (renamed := error.renamed(arguments)) is error:
            raise
        raise renamed from error


def progress(items: Iterable[T], total: int, unit: str, size: Callable[[T], int] = lambda _: 1) -> Iterator[T]:
    """Yields `items` with a progress bar on standard error if that is a terminal.

    Args:
      items: anything.
      total: of the sizes of all items.
      unit: label of the bar.
      size: by how much an item advances the bar.
    """
    from vqrae_jax.progress import progress_bar

    with progress_bar(unit) as bar:
        task = bar.add_task(unit, total=total)
        for item in items:
            yield item
            bar.advance(task, size(item))
