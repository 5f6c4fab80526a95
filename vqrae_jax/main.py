"""Trains, evaluates or plans a run.

python -m vqrae_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

import errno
import functools
import importlib.metadata
import json
import logging
import os
import re
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from vqrae_jax import __version__, distributed, runtime
from vqrae_jax import config as config_lib
from vqrae_jax.errors import ConfigError, DistributedError, UserError, first_line

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "config file, of configs/ or your own; override any field: --config.model.num_embeddings=16384"
)
flags.FLAGS["config"].parser.parse = config_lib.load_config_file  # its own parser reports mistakes with tracebacks
WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder or gs:// address of checkpoints, logs and images; a run in it is resumed"
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, for several processes where TPU, SLURM or Open MPI do not define it"
)
PROCESSES = flags.DEFINE_integer("processes", None, "number of processes; 1 ignores a cluster")
PROCESS = flags.DEFINE_integer("process", None, "index of this process, from 0")
START_TIMEOUT = flags.DEFINE_integer("start_timeout", 300, "seconds until all processes must have connected")
PROFILE_STEPS = flags.DEFINE_string("profile_steps", None, "10:13 traces steps 10 to 12 for TensorBoard and XProf")
MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "evaluate", "preflight", "weights"],
    "train; evaluate --checkpoint or the newest checkpoint of workdir; compile for --topology and report the cost of "
    "the run; or copy the weights of the config to --output and print the flags that name the copies",
)
OUTPUT = flags.DEFINE_string("output", None, "weights: folder or gs:// address")
CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "tokenizer to evaluate, or to start from as by train.start_from, with its model section in place of that of "
    "--config: workdir of a run, one of its checkpoints, an exported or imported folder, or a hub id",
)
# Fields of the model section that --checkpoint leaves to --config; the dtype is a part of the hash of frozen codes.
RUNTIME = ("attention", "remat", "dtype")
STEP = flags.DEFINE_integer("step", None, "step of --checkpoint, or of workdir to evaluate; the newest by default", 0)
TOPOLOGY = flags.DEFINE_string("topology", None, "preflight: v5e:16x16 (v4, v5e, v5p, v6e), gpu:8xh200 or cpu:8")
JSON = flags.DEFINE_string("json", None, "preflight: output file; preflight.json in workdir by default")
ALTERNATIVES = flags.DEFINE_integer(
    "alternatives", None, "preflight: other meshes and batches to compile; by default 2 if the config does not fit", 0
)


@runtime.log_lines()
def main(argv: Sequence[str]) -> None:
    """Runs the mode that the flags name."""
    profile_steps = _check_flags(argv)
    if MODE.value == "preflight":
        sys.exit(0 if _preflight() else 1)
    if MODE.value == "weights":
        _copy_weights()
        return
    runtime.start()
    distributed.connect(COORDINATOR.value, PROCESSES.value, PROCESS.value, START_TIMEOUT.value)
    is_first = distributed.process_index() == 0
    with runtime.log_level(logging.INFO if is_first else logging.ERROR):
        config = distributed.run_together(_load_config)
        from vqrae_jax.train import loop

        values = {**config.model_dump(mode="json"), "mode": MODE.value, "versions": _versions()}
        distributed.check_equal(values, exit_code=2)
        if MODE.value == "evaluate":
            metrics = loop.evaluate(config, WORKDIR.value, step=STEP.value, start=CHECKPOINT.value is not None)
            if is_first:
                print(json.dumps(metrics, indent=2))
            return
        try:
            loop.train(config, WORKDIR.value, profile_steps=profile_steps)
        except loop.Stopped as stopped:
            if is_first:
                command = shlex.join([sys.executable, "-m", "vqrae_jax.main", *sys.argv[1:]])
                print(f"{stopped}. To resume:\n  {command}", file=sys.stderr)


def run() -> None:
    """Runs `main`; errors of the user's input are one message, bugs keep their traceback.

    Exit codes: see `UserError`; 130 for an interrupt. What all processes would print, process 0 prints alone; until the
    processes are connected each prints its own error.
    """
    runtime.keep_freed_memory()
    runtime.exit_at_second_interrupt(_interrupt_message)
    # Orbax logs a page per checkpoint, and a page per thread that meets an error; --verbosity=0 shows them.
    absl_logging.set_verbosity(absl_logging.FATAL)
    try:
        app.run(main, flags_parser=_parse)
    except SystemExit as ended:  # rich raises it if standard error is closed
        if not ended.code:
            raise
        _exit(ended.code)
    except KeyboardInterrupt:
        print(_interrupt_message(), file=sys.stderr)
        _exit(130)
    except Exception as error:
        _report(error)
        _exit(error.exit_code if isinstance(error, UserError) else 1)


def _report(error: Exception) -> None:
    index = distributed.process_index()
    if type(error).__name__ == "JaxRuntimeError":
        distributed.wait_for_loss(2.0)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        print(f"error: no space left ({error}); make room, then run the same command again", file=sys.stderr)
    elif isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        remedy = "lower data.batch_size or the size of the model; docs/train.md lists what else saves memory"
        print(f"error: out of memory ({first_line(error)}): {remedy}", file=sys.stderr)
    elif not isinstance(error, UserError):
        traceback.print_exception(error)
    elif index == 0:
        print(f"error: {error}", file=sys.stderr)
    elif not (isinstance(error, DistributedError) and distributed.is_connected()):
        print(f"error (process {index}): {error}", file=sys.stderr)


def _exit(code: int) -> None:
    if distributed.process_count() > 1:
        distributed.exit_process(code)
    sys.exit(code)


def _interrupt_message() -> str:
    """Reports what is on disk after an interrupt that saved no step: before the first one, or a second interrupt."""
    training = "vqrae_jax.train.loop" in sys.modules and flags.FLAGS.is_parsed() and MODE.value == "train"
    if not training:
        return "interrupted"
    from vqrae_jax import checkpoint, storage

    steps = checkpoint.completed_steps(storage.resolve_path(WORKDIR.value) / checkpoint.FOLDER)
    if not steps:
        return "interrupted before the first checkpoint; the same command starts again"
    return f"interrupted; step {steps[-1]} is saved, and the same command resumes from it"


def _check_flags(argv: Sequence[str]) -> range:
    """Checks that the flags fit together; returns the steps to profile."""
    if len(argv) > 1:
        raise ConfigError(f"unexpected arguments: {' '.join(argv[1:])}; set fields as --config.NAME=VALUE")
    for name in ("config", {"preflight": "topology", "weights": "output"}.get(MODE.value, "workdir")):
        if not flags.FLAGS[name].present:
            raise ConfigError("is required, see python -m vqrae_jax.main --help", field=f"--{name}")
    if STEP.value is not None and MODE.value != "evaluate" and CHECKPOINT.value is None:
        message = "only --mode=evaluate and --checkpoint take a step; training resumes from the newest checkpoint"
        raise ConfigError(message, field="--step", value=STEP.value)
    first, colon, end = (PROFILE_STEPS.value or "1:1").partition(":")
    if not (colon and first.isdigit() and end.isdigit() and 1 <= int(first) <= int(end)):
        message = "expected a range FIRST:END, as in 10:13 (steps 10, 11, 12)"
        raise ConfigError(message, field="--profile_steps", value=PROFILE_STEPS.value)
    return range(int(first), int(end))


def _preflight() -> bool:
    """Reports what the config costs on --topology; returns whether it fits."""
    from vqrae_jax import storage
    from vqrae_jax.preflight import command

    path = JSON.value or WORKDIR.value
    if path and (path != JSON.value or storage.resolve_path(path).is_dir()):
        path = os.path.join(path, "preflight.json")
    return command.preflight(_load_config(), TOPOLOGY.value, ALTERNATIVES.value, path).fits


def _copy_weights() -> None:
    from vqrae_jax.build import weights

    config = _load_config()
    metrics = {*config.evaluation.metrics, *config.evaluation.training_metrics}
    print(*weights.copy_all(weights.list_weights(config, metrics), OUTPUT.value.rstrip("/")), sep="\n")


def _versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {"vqrae_jax": __version__} | {name: importlib.metadata.version(name) for name in names}


def _parse(argv: Sequence[str]) -> Sequence[str]:
    """Parses flags; checks names of overridden fields first, because ml_collections reports them with the whole config.

    Raises:
      ConfigError: an unknown flag, an invalid value, or a config file without a config.
    """
    for argument in argv:
        if field := re.match(r"--?config\.([\w.]+)", argument):
            config_lib.check_field(config_lib.Config, field[1])
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        if isinstance(error.__context__, ConfigError):
            raise ConfigError(str(error.__context__), field="--config") from None
        raise ConfigError(f"{error}; see python -m vqrae_jax.main --help") from None
    except (TypeError, AttributeError, KeyError) as error:  # an override of the wrong type, or of a section
        raise ConfigError(_override_message(error), field="--config") from None


def _override_message(error: Exception) -> str:
    """Returns ml_collections' message; for an unknown field it raises AttributeError(KeyError(message))."""
    inner = error.args[0] if error.args and isinstance(error.args[0], KeyError) else error
    return f"unknown field {'; '.join(str(inner.args[0]).splitlines())}" if isinstance(inner, KeyError) else str(error)


def _load_config() -> config_lib.Config:
    values = CONFIG.value.to_dict()
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    if message := config_lib.prefer_command_line_steps(values, overrides):
        logging.getLogger("vqrae_jax").warning("%s", message)
    if CHECKPOINT.value is not None:
        _start_from_checkpoint(values, overrides)
    return config_lib.from_dict(config_lib.Config, values)


def _start_from_checkpoint(values: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Sets train.start_from and the model section of --checkpoint, except for RUNTIME and fields of the command line.

    A run that is resumed has the model section in its own checkpoints, and the tokenizer that it started from may be
    gone.
    """
    from vqrae_jax import checkpoint, storage
    from vqrae_jax.inference.location import locate

    if values["train"]["task"] == "generator":
        message = (
            "is for tokenizers; a generator is evaluated in its --workdir, and its tokenizer is generator.tokenizer"
        )
        raise ConfigError(message, field="--checkpoint", value=CHECKPOINT.value)
    if values["train"]["start_from"]:
        message = "is set by --checkpoint; leave one of them out"
        raise ConfigError(message, field="train.start_from", value=values["train"]["start_from"])
    folder = storage.resolve_path(WORKDIR.value or ".") / checkpoint.FOLDER
    resumes = MODE.value == "train" and checkpoint.completed_steps(folder)
    location = locate(WORKDIR.value) if resumes else locate(CHECKPOINT.value, STEP.value)
    values["train"]["start_from"] = CHECKPOINT.value if resumes or STEP.value is None else str(location.path)
    runtime = RUNTIME if "quantizer" in values["train"]["trainable"] or MODE.value == "evaluate" else RUNTIME[:2]
    values["model"] = location.config.model_dump() | {name: values["model"][name] for name in runtime}
    for name, value in overrides.items():
        section, _, field = name.rpartition(".")
        if name.startswith("model."):
            functools.reduce(dict.__getitem__, section.split("."), values)[field] = value


if __name__ == "__main__":
    run()
