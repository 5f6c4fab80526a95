"""The command, whose processes train, then evaluate: one of them misses a file, then they find different images.

Their clocks differ: by that of process 1 alone, a checkpoint is due after every step.

What each process gets is written to workdir/results/<process>.json.
"""

import json
import pathlib

import jax

from vqrae_jax import main
from vqrae_jax.build import judges
from vqrae_jax.data import folder
from vqrae_jax.errors import DataError, DistributedError
from vqrae_jax.train import hooks, loop

CLOCK = hooks.SaveClock
train, load, list_images = loop.train, judges.load_metric_networks, folder.list_images


def load_nothing(*_):
    raise DataError("the network's file is gone")


def error_of_evaluation(config, workdir):
    try:
        loop.evaluate(config, workdir)
    except DistributedError as error:
        return str(error)


def hasty_clock(minutes):
    return CLOCK(1e-9 if jax.process_index() else minutes)


def train_and_evaluate(config, workdir, **options):
    hooks.SaveClock = hasty_clock
    metrics = train(config, workdir, **options)
    clocks = CLOCK(1.0), CLOCK(1e-9 if jax.process_index() == 0 else 1.0)
    results, second = {"metrics": metrics, "due": [clock.is_due() for clock in clocks]}, jax.process_index() == 1
    judges.load_metric_networks = load_nothing if second else load
    results["missing file"] = error_of_evaluation(config, workdir)
    judges.load_metric_networks = load
    folder.list_images = lambda *arguments: list_images(*arguments)[second:]
    data = config.data.model_copy(update={"source": "folder", "eval_path": f"{workdir}/images"})
    results["different images"] = error_of_evaluation(config.model_copy(update={"data": data}), workdir)
    path = pathlib.Path(workdir) / "results" / f"{jax.process_index()}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results))


loop.train = train_and_evaluate
main.run()
