"""python -m vqrae_jax.main --config=configs/quickstart.py --workdir=runs/quickstart"""

import json
import logging
import sys
from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

from vqrae_jax import config as config_lib

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/, or your own. Override any field: --config.model.num_embeddings=16384"
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, logs and pictures; a run in it is resumed.")
MODE = flags.DEFINE_enum("mode", "train", ["train", "evaluate"], "train, or evaluate the newest checkpoint of workdir.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise config_lib.ConfigError(f"unexpected arguments: {' '.join(argv[1:])}; fields are given as --config.NAME=VALUE")
    for flag in (CONFIG, WORKDIR):
        if flag.value is None:
            raise config_lib.ConfigError(f"--{flag.name} is required, see python -m vqrae_jax.main --help")
    config = config_lib.from_dict(config_lib.Config, CONFIG.value.to_dict())
    from vqrae_jax.train import loop

    if MODE.value == "train":
        loop.train(config, WORKDIR.value)
    else:
        print(json.dumps(loop.evaluate(config, WORKDIR.value), indent=2))


def run() -> None:
    """What is wrong with the input is one message and exit code 1, not a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("vqrae_jax").setLevel(logging.INFO)
    try:
        app.run(main, flags_parser=_parse)
    except EXPECTED as error:
        sys.exit(f"error: {error}")


def _parse(argv: Sequence[str]) -> Sequence[str]:
    """Flags of unknown fields and config files that do not exist are errors like any other."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, TypeError, FileNotFoundError, config_flags.UnsupportedOperationError) as error:
        raise config_lib.ConfigError(f"--config: {error.args[0] if error.args else error}") from None


# Input errors are ValueErrors of our own classes and CheckpointError; anything else is a bug and keeps its traceback.
EXPECTED = (config_lib.ConfigError,)


if __name__ == "__main__":
    run()
