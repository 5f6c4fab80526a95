"""python -m vqrae_jax.main --config=configs/quickstart.py --workdir=runs/quickstart"""

import errno
import importlib.metadata
import json
import logging
import os
import re
import shlex
import sys
import traceback
from collections.abc import Sequence

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from vqrae_jax import __version__, distributed, runtime
from vqrae_jax import config as config_lib
from vqrae_jax.errors import ConfigError, DistributedError, UserError

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/, or your own. Override any field: --config.model.num_embeddings=16384"
)
flags.FLAGS["config"].parser.parse = config_lib.load_config_file  # its own answers mistakes in the file with tracebacks
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder or gs:// address of checkpoints, logs, pictures; a run there is resumed."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, for several processes where TPU, SLURM or Open MPI do not say it."
)
PROCESSES = flags.DEFINE_integer(
    "processes", None, "How many processes; 1 starts nothing even where there is a cluster."
)
PROCESS = flags.DEFINE_integer("process", None, "Number of this process, from 0.")
START_TIMEOUT = flags.DEFINE_integer("start_timeout", 300, "Seconds until all processes must be there.")
PROFILE_STEPS = flags.DEFINE_string("profile_steps", None, "10:13 traces steps 10 to 12 for TensorBoard and XProf.")
MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "evaluate", "preflight"],
    "train; or evaluate the newest checkpoint of workdir; or compile for --topology and tell what the run would cost.",
)
STEP = flags.DEFINE_integer("step", None, "For evaluate: the step of another checkpoint than the newest.", 0)
TOPOLOGY = flags.DEFINE_string("topology", None, "For preflight: v5e:16x16 (v4, v5e, v5p, v6e), gpu:8xh200 or cpu:8.")
JSON = flags.DEFINE_string("json", None, "For preflight: where to write it; preflight.json of workdir if there is one.")
ALTERNATIVES = flags.DEFINE_integer(
    "alternatives", None, "For preflight: other meshes and batches to compile; 2 if the config does not fit, else 0.", 0
)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise ConfigError(f"unexpected arguments: {' '.join(argv[1:])}; fields are given as --config.NAME=VALUE")
    for name in ("config", "topology" if MODE.value == "preflight" else "workdir"):
        if not flags.FLAGS[name].present:
            raise ConfigError(f"--{name} is required, see python -m vqrae_jax.main --help")
    if STEP.value is not None and MODE.value != "evaluate":
        raise ConfigError(f"--step={STEP.value} is for --mode=evaluate; training goes on from the newest checkpoint")
    profile_steps = _profile_steps()
    if MODE.value == "preflight":
        logging.getLogger("vqrae_jax").setLevel(logging.WARNING)
        sys.exit(0 if _preflight(_read_config()) else 1)
    runtime.start()
    distributed.connect(COORDINATOR.value, PROCESSES.value, PROCESS.value, START_TIMEOUT.value)
    logging.getLogger("vqrae_jax").setLevel(logging.INFO if distributed.process_index() == 0 else logging.ERROR)
    config = distributed.run_together(_read_config)
    distributed.check_equal({**config.model_dump(mode="json"), "mode": MODE.value, "versions": _versions()})
    from vqrae_jax.train import loop

    if MODE.value == "train":
        try:
            loop.train(config, WORKDIR.value, profile_steps=profile_steps)
        except loop.Stopped as stopped:
            if distributed.process_index() == 0:
                print(f"{stopped}. To go on:\n  {_command()}", file=sys.stderr)
    else:
        figures = loop.evaluate(config, WORKDIR.value, step=STEP.value)
        if distributed.process_index() == 0:
            print(json.dumps(figures, indent=2))


def _preflight(config: config_lib.Config) -> bool:
    """Whether the config fits."""
    from vqrae_jax.preflight import command

    path = JSON.value or (WORKDIR.value and os.path.join(WORKDIR.value, "preflight.json"))
    return command.preflight(config, TOPOLOGY.value, ALTERNATIVES.value, path).fits


def run() -> None:
    """What is wrong with the input is one message, not a traceback.

    What all processes would say, process 0 says alone; before they are connected nobody knows what the others say.
    Exit code 2 is of flags and settings that no further attempt would mend, which launchers therefore give up on
    (launch/gke, launch/tpu/watch.sh); 1 of everything else: files, buckets, other processes, bugs.
    """
    runtime.keep_freed_memory()
    # Orbax tells a page per checkpoint, and of what it raises a page per thread that met it; --verbosity=0 shows them.
    absl_logging.set_verbosity(absl_logging.FATAL)
    try:
        app.run(main, flags_parser=_parse)
    except KeyboardInterrupt:
        print(_interrupted(), file=sys.stderr)
        _leave(130)
    except Exception as error:
        said_by_first = isinstance(error, DistributedError) and distributed.is_connected()
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            print(f"error: no space left ({error}); make room, and the same command goes on", file=sys.stderr)
        elif not isinstance(error, UserError):
            traceback.print_exc()
        elif distributed.process_index() == 0:
            print(f"error: {error}", file=sys.stderr)
        elif not said_by_first:
            print(f"error (process {distributed.process_index()}): {error}", file=sys.stderr)
        _leave(error.exit_code if isinstance(error, UserError) else 1)


def _leave(code: int) -> None:
    if distributed.process_count() > 1:
        distributed.exit_process(code)
    sys.exit(code)


def _interrupted() -> str:
    """What Ctrl-C leaves behind where no step is waited for and saved: before the first one, or the second time."""
    begun = "vqrae_jax.train.loop" in sys.modules and flags.FLAGS.is_parsed() and MODE.value == "train"
    if not begun:
        return "interrupted"
    from vqrae_jax import checkpoint, storage

    steps = checkpoint.completed_steps(storage.at(WORKDIR.value) / checkpoint.FOLDER)
    if not steps:
        return "interrupted before anything was saved: the same command begins anew"
    return f"interrupted: step {steps[-1]} is saved, and the same command goes on from there"


def _command() -> str:
    return shlex.join([sys.executable, "-m", "vqrae_jax.main", *sys.argv[1:]])


def _versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {"vqrae_jax": __version__} | {name: importlib.metadata.version(name) for name in names}


def _profile_steps() -> range:
    first, colon, end = (PROFILE_STEPS.value or "1:1").partition(":")
    if not (colon and first.isdigit() and end.isdigit() and 1 <= int(first) <= int(end)):
        raise ConfigError(f"--profile_steps={PROFILE_STEPS.value!r} is no range, as in 10:13 (10, 11, 12)")
    return range(int(first), int(end))


def _parse(argv: Sequence[str]) -> Sequence[str]:
    """Checks the names of overridden fields before ml_collections does: its message is a dump of the config.

    Raises:
      ConfigError: an unknown flag, a value that is none of the flag's, a config file that makes no config.
    """
    for argument in argv:
        if field := re.match(r"--?config\.([\w.]+)", argument):
            config_lib.check_field(config_lib.Config, field[1])
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        if isinstance(error.__context__, ConfigError):
            raise ConfigError(f"--config: {error.__context__}") from None
        raise ConfigError(f"{error}; see python -m vqrae_jax.main --help") from None
    except (TypeError, AttributeError, KeyError) as error:  # an override of the wrong type, or of a section
        raise ConfigError(f"--config: {_said(error)}") from None


def _said(error: Exception) -> str:
    """Of a field that is not there ml_collections raises AttributeError(KeyError(text)), whose text is a quotation."""
    inner = error.args[0] if error.args and isinstance(error.args[0], KeyError) else error
    return f"no field {'; '.join(str(inner.args[0]).splitlines())}" if isinstance(inner, KeyError) else str(error)


def _read_config() -> config_lib.Config:
    values = CONFIG.value.to_dict()
    if told := config_lib.prefer_command_line_steps(values, config_flags.get_override_values(flags.FLAGS["config"])):
        logging.getLogger("vqrae_jax").warning("%s", told)
    return config_lib.from_dict(config_lib.Config, values)


if __name__ == "__main__":
    run()
