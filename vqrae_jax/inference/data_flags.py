"""The arguments by which a command is told its images: any source that a config's data section can name."""

import argparse

from vqrae_jax.config import ConfigError, DataConfig, from_dict


def add(parser: argparse.ArgumentParser) -> None:
    """Adds --data, --source, --name and --split."""
    parser.add_argument("--data", help="images: a folder, or what data.path is in a config for another --source")
    parser.add_argument("--source", default="folder", help="what data.source is in a config; default: folder")
    parser.add_argument("--name", help="what data.name is in a config")
    parser.add_argument("--split", default="train", help="of datasets that have splits; default: train")


def data_config(args: argparse.Namespace, image_size: int, batch_size: int) -> DataConfig:
    """The images as a config's validation data: in order, with nothing random.

    Raises:
      ConfigError: no such source, or no --data for it.
    """
    if args.data is None and args.source == "folder":
        raise ConfigError("--data is missing: give a folder of images, or another --source")
    given = {"source": args.source, "path": args.data, "eval_path": args.data, "name": args.name}
    given |= {"eval_split": args.split, "image_size": image_size, "eval_batch_size": batch_size}
    return from_dict(DataConfig, given)
