"""A trained RAE or VQRAE of the PyTorch origin -> a folder that `Tokenizer.load` reads.

python -m vqrae_jax.commands.import_pytorch --checkpoint=0100000.pt --config=configs/dinov2_b.py --output=imported
"""

import argparse
import logging
import pathlib
from collections.abc import Sequence

from vqrae_jax import config as config_lib
from vqrae_jax import storage
from vqrae_jax.commands import command_line as command
from vqrae_jax.config import ModelConfig
from vqrae_jax.errors import ConfigError
from vqrae_jax.inference import pytorch_checkpoint
from vqrae_jax.inference import saving as folder
from vqrae_jax.pretrained import readers


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vqrae_jax.commands.import_pytorch",
        description="Turns a checkpoint of the PyTorch RAE or VQRAE into a folder for Tokenizer.load.",
    )
    parser.add_argument("--checkpoint", required=True, help="a file, or owner/name/path/to/file of a hub repository")
    parser.add_argument("--config", required=True, help="configs/NAME.py[:argument], or .json: the model it is of")
    parser.add_argument(
        "--weights", choices=["ema", "model"], default="ema", help="of a training checkpoint; default: %(default)s"
    )
    parser.add_argument("--output", required=True, help="folder to write")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> storage.Path:
    """Runs the command; returns the folder written. The encoder goes into it, as the checkpoint has it."""
    config = read_config(args.config)
    _, variables = pytorch_checkpoint.read_checkpoint(config, args.checkpoint, args.weights)
    with storage.stage_output(args.output) as place:
        folder.write(place, config, variables, frozen=False)
    return storage.resolve_path(args.output)


def read_config(name: str) -> ModelConfig:
    """The model section of a config file: Python as in configs/ (an argument after a colon), or JSON.

    Raises:
      ConfigError: the file is not there, is none, or a field of it is not accepted.
    """
    path = name.partition(":")[0]
    file = pathlib.Path(path)
    if not file.is_file() or file.suffix not in (".py", ".json"):
        raise ConfigError(f"--config={name}: {path} is no .py or .json file on this machine")
    if file.suffix == ".json":
        return config_lib.from_dict(config_lib.Config, readers.read_json(file, "--config")).model
    try:
        values = config_lib.load_config_file(name)
    except ConfigError as error:
        raise ConfigError(f"--config: {error}") from None
    return config_lib.from_dict(config_lib.Config, values.to_dict()).model


def main() -> None:
    command.run(lambda: print(f"wrote {run(parse())}"), logging.INFO)


if __name__ == "__main__":
    main()
