"""The pretrained weights that a config names, read before anything is built, so that all that are missing are named."""

import concurrent.futures
import functools
import pathlib
import shutil
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from vqrae_jax import storage
from vqrae_jax.build.encoder import weights_source
from vqrae_jax.config import Config, Metric
from vqrae_jax.errors import ConfigError, UserError, WeightsError
from vqrae_jax.pretrained.judge_weights import INCEPTION_URL
from vqrae_jax.pretrained.sources import fetch_file, fetch_folder, fetch_weights

THREADS = 8  # downloads at the same time
REMEDIES = {  # by section of the config
    "loss.perceptual": "without it: --config.loss.perceptual.weight=0, and no 'lpips' in evaluation.metrics",
    "adversary": "without a discriminator: --config.adversary.discriminator=none",
    "evaluation": "without its metrics: leave 'inception' or 'encoder' out of evaluation.metrics and training_metrics",
}


class Weights(NamedTuple):
    """The weights of a network: a config field, its value, and the function that returns their local path."""

    field: str
    name: str | None
    fetch: Callable[[str | None, str], pathlib.Path]


def list_weights(config: Config, metrics: Collection[Metric], losses: bool = True) -> list[Weights]:
    """Returns the weights of the model, of the networks of `metrics`, and of those of the losses."""
    model, loss = config.model, config.loss.perceptual
    perceptual = loss.network if losses and loss.weight else None
    lpips = perceptual == "lpips" or "lpips" in metrics
    rows = [
        (model.encoder_config_path, weights_source(model)[1], fetch_folder),
        ("/" in (model.decoder_config_path or ""), "model.decoder_config_path", fetch_folder),
        (model.pretrained_decoder_path, "model.pretrained_decoder_path", fetch_weights),
        (model.normalization_stat_path, "model.normalization_stat_path", fetch_file),
        (lpips, "loss.perceptual.trunk", fetch_weights),
        (lpips, "loss.perceptual.heads", fetch_weights),
        (perceptual == "encoder" and loss.path, "loss.perceptual.path", fetch_folder),
        (losses and config.adversary.discriminator == "dino", "adversary.path", fetch_weights),
        ("inception" in metrics, "evaluation.inception_path", _fetch_inception),
        ("encoder" in metrics, "evaluation.encoder_path", fetch_folder),
    ]
    value = functools.partial(functools.reduce, getattr)
    return [Weights(field, value(field.split("."), config), fetch) for used, field, fetch in rows if used]


def fetch_all(weights: Sequence[Weights]) -> list[pathlib.Path]:
    """Returns the local paths of weights; those in a bucket or on the hub are downloaded.

    Raises:
      WeightsError: with the messages of all that are missing. A single one keeps its class and field.
    """

    def fetch(item: Weights) -> pathlib.Path | UserError:
        try:
            return item.fetch(item.name, item.field)
        except UserError as error:
            message = "\n  ".join([error.message, *filter(None, [REMEDIES.get(item.field.rpartition(".")[0])])])
            return type(error)(message, field=error.field, value=error.value, exit_code=error.exit_code)

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(fetch, weights))
    errors = [result for result in results if isinstance(result, UserError)]
    if len(errors) > 1:
        title = f"{len(errors)} of the {len(results)} pretrained weights of this run are missing:"
        raise WeightsError("\n".join([title, *map(str, errors)]), exit_code=max(e.exit_code for e in errors))
    for error in errors:
        raise error
    return results


def copy_all(weights: Sequence[Weights], folder: str) -> list[str]:
    """Copies weights to a folder or bucket; returns the flags with which a run reads the copies.

    A second file or folder of the same name is copied into a folder that is called like its field.
    """
    flags, origins = [], {}
    for item, path in zip(weights, fetch_all(weights), strict=True):
        is_hub_name = not (storage.is_remote(item.name) or pathlib.Path(item.name).exists())
        name = item.name if is_hub_name else path.name
        name = name if origins.setdefault(name, path) == path else f"{item.field}/{name}"
        with storage.stage_output(f"{folder}/{name}") as target:
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, target, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, target)
        flags.append(f"--config.{item.field}={folder}/{name}")
    return flags


def _fetch_inception(name: str | None, field: str) -> pathlib.Path:
    if name is None:
        raise ConfigError(f"not set; download {INCEPTION_URL} and set its path", field=field, value=None)
    return fetch_weights(name, field)
