"""python -m vqrae_jax.main --config=configs/quickstart.py --workdir=runs/quickstart"""

import json
import logging
import os
import pathlib
import re
import sys
from collections.abc import Sequence

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from vqrae_jax import config as config_lib

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/, or your own. Override any field: --config.model.num_embeddings=16384"
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, logs and pictures; a run in it is resumed.")
MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "evaluate", "preflight"],
    "train; or evaluate the newest checkpoint of workdir; or compile for --topology and tell what the run would cost.",
)
TOPOLOGY = flags.DEFINE_string("topology", None, "For preflight: v5e:16x16 (v4, v5e, v5p, v6e), gpu:8xh200 or cpu:8.")
JSON = flags.DEFINE_string("json", None, "For preflight: where to write it; preflight.json of workdir if there is one.")
ALTERNATIVES = flags.DEFINE_integer("alternatives", 2, "For preflight: other meshes and batches to compile.", 0)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise config_lib.ConfigError(
            f"unexpected arguments: {' '.join(argv[1:])}; fields are given as --config.NAME=VALUE"
        )
    if "://" in (WORKDIR.value or ""):
        raise config_lib.ConfigError(
            f"--workdir={WORKDIR.value!r}: a run is written to a folder: mount the bucket (gcsfuse) and give its path; "
            "data.path and data.eval_path may be addresses"
        )
    for name in ("config", "topology" if MODE.value == "preflight" else "workdir"):
        if not flags.FLAGS[name].present:
            raise config_lib.ConfigError(f"--{name} is required, see python -m vqrae_jax.main --help")
    config = _read_config()
    if MODE.value == "preflight":
        sys.exit(0 if _preflight(config) else 1)
    from vqrae_jax.train import loop

    if MODE.value == "train":
        loop.train(config, WORKDIR.value)
    else:
        print(json.dumps(loop.evaluate(config, WORKDIR.value), indent=2))


def _preflight(config: config_lib.Config) -> bool:
    """Whether the config fits."""
    from vqrae_jax.preflight import command

    path = JSON.value or (WORKDIR.value and os.path.join(WORKDIR.value, "preflight.json"))
    return command.preflight(config, TOPOLOGY.value, ALTERNATIVES.value, path and pathlib.Path(path)).fits


def run() -> None:
    """What is wrong with the input is one message and exit code 1, not a traceback."""
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax tells a page per checkpoint
    logging.getLogger("vqrae_jax").setLevel(logging.INFO)
    try:
        app.run(main, flags_parser=_parse)
    except Exception as error:
        if not isinstance(error, _input_errors()):
            raise
        sys.exit(f"error: {error}")


def _input_errors() -> tuple[type[Exception], ...]:
    """What is wrong with input, or with where a run has got to; anything else is a bug and keeps its traceback."""
    from vqrae_jax.checkpoint import CheckpointError
    from vqrae_jax.data.errors import DataError
    from vqrae_jax.preflight.chips import TopologyError
    from vqrae_jax.pretrained.errors import PretrainedError
    from vqrae_jax.sharding import MeshError
    from vqrae_jax.train.guard import DivergedError

    return (
        config_lib.ConfigError, DataError, PretrainedError, CheckpointError, MeshError, TopologyError, DivergedError
    )  # fmt: skip


def _parse(argv: Sequence[str]) -> Sequence[str]:
    """Checks the names of overridden fields before ml_collections does: its message is a dump of the config."""
    for argument in argv:
        if field := re.match(r"--?config\.([\w.]+)", argument):
            config_lib.check_field(config_lib.Config, field[1])
    try:
        return app.parse_flags_with_usage(argv)
    except (TypeError, AttributeError, KeyError) as error:  # an override of the wrong type, or of a section
        raise config_lib.ConfigError(f"--config: {error}") from None


def _read_config() -> config_lib.Config:
    try:
        values = CONFIG.value.to_dict()
    except OSError as error:  # ml_collections' word for a file that is not there or does not run
        raise config_lib.ConfigError(f"--config: {error}") from None
    return config_lib.from_dict(config_lib.Config, values)


if __name__ == "__main__":
    run()
