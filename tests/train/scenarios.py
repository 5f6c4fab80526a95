"""The command, whose processes train, then evaluate, then miss a file in one of them, then find different images.

What each process gets is written to workdir/results/<process>.json.
"""

import json
import pathlib

import jax

from vqrae_jax import main
from vqrae_jax.build import judges
from vqrae_jax.data import folder
from vqrae_jax.errors import DataError, DistributedError
from vqrae_jax.train import loop

train, load, list_images = loop.train, judges.load_metric_networks, folder.list_images


def load_nothing(*_):
    raise DataError("the network's file is gone")


def error_of_evaluation(config, workdir):
    try:
        loop.evaluate(config, workdir)
    except DistributedError as error:
        return str(error)


def train_and_evaluate(config, workdir, **options):
    train(config, workdir, **options)
    results, second = {"metrics": loop.evaluate(config, workdir)}, jax.process_index() == 1
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
