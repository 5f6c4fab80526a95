"""The arguments by which a command is told its images: any source that a config's data section can name."""

import argparse
import contextlib
import re
from collections.abc import Iterator
from typing import Any, get_args

from vqrae_jax.config import DataConfig, from_dict
from vqrae_jax.errors import ConfigError, DataError

ARGUMENTS = {
    "data.eval_path": "--data", "data.path": "--data", "data.source": "--source", "data.name": "--name",
    "data.eval_split": "--split",
}  # fmt: skip

SOURCES = get_args(DataConfig.model_fields["source"].annotation)


def add(parser: argparse.ArgumentParser) -> None:
    """Adds --data, --source, --name and --split."""
    parser.add_argument("--data", help="images: a folder, or what data.path is in a config for another --source")
    parser.add_argument(
        "--source", default="folder", help=f"{', '.join(SOURCES)}, as data.source in a config; default: folder"
    )
    parser.add_argument("--name", help="what data.name is in a config")
    parser.add_argument("--split", default="train", help="of datasets that have splits; default: train")


@contextlib.contextmanager
def told() -> Iterator[None]:
    """What is wrong with the images is told of the argument that was given, not of the config field behind it."""
    try:
        yield
    except (ConfigError, DataError) as error:
        text = re.sub(r"(?<![\w/.])data\.\w+", lambda field: ARGUMENTS.get(field[0], field[0]), str(error))
        raise type(error)(text) from error


def data_config(args: argparse.Namespace, **fields: Any) -> DataConfig:
    """The images as a config's validation data: in order, with nothing random; `fields` are further ones of it.

    Raises:
      ConfigError: no such source, or it lacks --data or --split.
    """
    if args.source not in SOURCES:
        raise ConfigError(f"--source={args.source}: give one of {', '.join(SOURCES)}")
    if args.data is None and args.source not in ("photographs", "tfds"):
        raise ConfigError(f"--data is missing: --source={args.source} needs to know where the images are")
    if not args.split:
        raise ConfigError("--split is empty: name the split of the dataset")
    given = {"source": args.source, "path": args.data, "eval_path": args.data, "name": args.name}
    return from_dict(DataConfig, given | {"eval_split": args.split} | fields)
