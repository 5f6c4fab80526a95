"""Epochs to steps, in one place: nothing else in the package counts in epochs."""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vqrae_jax.config.schema import MAX_STEPS, AdamWConfig, Config, Section
from vqrae_jax.errors import ConfigError

log = logging.getLogger(__name__)


def epochs_to_steps(config: Config, count_images: Callable[[], int]) -> Config:
    """Returns the config with epochs converted to steps and learning rates scaled to the batch.

    Args:
      config: of a run.
      count_images: returns the number of training images; called only if the config has epochs.

    Raises:
      ConfigError: train.epochs is less than one step, or epochs are more steps than the state can count.
    """
    count_images, batch, converted = functools.cache(count_images), config.data.batch_size, []

    def resolve(section: Section, prefix: str = "") -> Section:
        changes: dict[str, Any] = {}
        for name in type(section).model_fields:
            value = getattr(section, name)
            if isinstance(value, Section):
                changes[name] = resolve(value, f"{prefix}{name}.")
            elif name.endswith("epochs") and value is not None:
                steps = f"{name.removesuffix('epochs')}steps"
                changes |= {name: None, steps: int(value * (count_images() // batch))}
                converted.append(f"{prefix}{name}={value} is {steps}={changes[steps]}")
                if changes[steps] > MAX_STEPS:
                    raise ConfigError(f"{converted[-1]}; at most {MAX_STEPS} steps", field=f"{prefix}{name}")
        if isinstance(section, AdamWConfig) and section.reference_batch:
            scale = batch / section.reference_batch
            rates = {n: getattr(section, n) * scale for n in ("learning_rate", "final_learning_rate")}
            changes |= {"reference_batch": None, **rates}
        section = section.model_copy(update=changes)
        if isinstance(section, AdamWConfig):
            _warn_of_rising_rate(section, prefix)
        return section

    resolved = resolve(config)
    if resolved.train.steps < 1:
        raise ConfigError(
            f"less than one step: {count_images()} training images are {count_images() // batch} batches of "
            f"data.batch_size={batch}; set more epochs, smaller batches, or train.steps in place of train.epochs",
            field="train.epochs", value=config.train.epochs,
        )  # fmt: skip
    adversary = resolved.adversary
    if adversary.discriminator != "none" and adversary.generator_start_steps < adversary.start_steps:
        log.warning(
            "adversary.generator_start_steps=%d is before adversary.start_steps=%d: between them the decoder trains "
            "against a discriminator that has not trained",
            adversary.generator_start_steps, adversary.start_steps,
        )  # fmt: skip
    if converted:
        log.info("an epoch is %d steps: %s", count_images() // batch, ", ".join(converted))
    return resolved


def prefer_command_line_steps(values: dict[str, Any], overrides: Mapping[str, Any]) -> str:
    """Removes epochs from `values` where the command line sets the same quantity in steps; returns a warning, or "".

    Otherwise the epochs of a config file would override the steps of a short trial run.

    Args:
      values: fields of a config, nested; changed in place.
      overrides: fields that the command line sets, by path: {"train.steps": 1000}.

    Raises:
      ConfigError: the command line sets both.
    """
    removed = []
    for name, steps in overrides.items():
        epochs = f"{name.removesuffix('steps')}epochs"
        section = functools.reduce(lambda tree, part: tree.get(part, {}), name.split(".")[:-1], values)
        before = section.get(epochs.rpartition(".")[2]) if name.endswith("steps") else None
        if before is None:
            continue
        if epochs in overrides:
            raise ConfigError(f"{epochs}={before} is set as well; remove one of them", field=name, value=steps)
        section[epochs.rpartition(".")[2]] = None
        removed.append(f"{epochs}={before}")
    if not removed:
        return ""
    rest = [f"{name}={value}" for name, value in _epoch_fields(values)]
    remaining = f"; still in epochs: {', '.join(rest)}" if rest else ""
    return f"steps of the command line replace the config file's {', '.join(removed)}{remaining}"


def _warn_of_rising_rate(section: AdamWConfig, prefix: str) -> None:
    if section.schedule != "constant" and section.final_learning_rate > section.learning_rate:
        log.warning(
            "%slearning_rate=%g rises to final_learning_rate=%g: lower that as well, or set schedule='constant'",
            prefix, section.learning_rate, section.final_learning_rate,
        )  # fmt: skip


def _epoch_fields(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every field that is set in epochs, by path."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _epoch_fields(value, f"{prefix}{name}.")
        elif name.endswith("epochs") and value is not None:
            yield f"{prefix}{name}", value
