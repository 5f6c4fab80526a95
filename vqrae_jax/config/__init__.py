"""Configs of runs: built from plain values with one message for all that is wrong, edited by files, saved as JSON."""

import difflib
import functools
import json
import logging
import typing
from collections.abc import Callable
from typing import Any

import ml_collections
import pydantic

from vqrae_jax.config.load import load_config_file, prefer_command_line_steps
from vqrae_jax.config.schema import (
    AdamWConfig,
    AdversaryConfig,
    Config,
    DataConfig,
    EncoderClass,
    EncoderParams,
    EvaluationConfig,
    Figure,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    Part,
    PerceptualConfig,
    QuantizerParams,
    Section,
    TrainConfig,
)
from vqrae_jax.errors import ConfigError

__all__ = [
    "AdamWConfig",
    "AdversaryConfig",
    "Config",
    "DataConfig",
    "EncoderClass",
    "EncoderParams",
    "EvaluationConfig",
    "Figure",
    "LossConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Part",
    "PerceptualConfig",
    "QuantizerParams",
    "Section",
    "TrainConfig",
    "check_field",
    "defaults",
    "epochs_to_steps",
    "from_dict",
    "from_json",
    "load_config_file",
    "parse_decoder_and_size",
    "prefer_command_line_steps",
    "to_json",
]

log = logging.getLogger(__name__)

SectionT = typing.TypeVar("SectionT", bound=Section)


def from_dict(schema: type[SectionT], values: dict[str, Any]) -> SectionT:
    """Builds `schema` from plain values.

    Raises:
      ConfigError: lists every unknown, missing or unacceptable field at once, with the nearest known name.
    """
    try:
        return schema.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(_explain(schema, e) for e in error.errors())) from None


def epochs_to_steps(config: Config, count_images: Callable[[], int]) -> Config:
    """The config with epochs turned into steps and learning rates scaled to the batch.

    Args:
      count_images: how many training images there are; only asked if the config speaks of epochs.

    Raises:
      ConfigError: train.epochs is less than one step.
    """
    count_images, batch, told = functools.cache(count_images), config.data.batch_size, []

    def resolve(section: Section, prefix: str = "") -> Section:
        changes: dict[str, Any] = {}
        for name in type(section).model_fields:
            value = getattr(section, name)
            if isinstance(value, Section):
                changes[name] = resolve(value, f"{prefix}{name}.")
            elif name.endswith("epochs") and value is not None:
                steps = f"{name.removesuffix('epochs')}steps"
                changes |= {name: None, steps: int(value * (count_images() // batch))}
                told.append(f"{prefix}{name}={value} is {steps}={changes[steps]}")
        if isinstance(section, AdamWConfig) and section.reference_batch:
            scale = batch / section.reference_batch
            rates = {n: getattr(section, n) * scale for n in ("learning_rate", "final_learning_rate")}
            changes |= {"reference_batch": None, **rates}
        section = section.model_copy(update=changes)
        if isinstance(section, AdamWConfig):
            _tell_rising(section, prefix)
        return section

    resolved = resolve(config)
    if resolved.train.steps < 1:
        raise ConfigError(
            f"train.epochs={config.train.epochs} is less than one step: {count_images()} training images are "
            f"{count_images() // batch} batches of data.batch_size={batch}; give more epochs, smaller batches, or "
            "train.steps in place of train.epochs"
        )
    _tell_early_generator(resolved.adversary)
    if told:
        log.info("in epochs of %d steps: %s", count_images() // batch, ", ".join(told))
    return resolved


def _tell_rising(section: AdamWConfig, prefix: str) -> None:
    if section.schedule != "constant" and section.final_learning_rate > section.learning_rate:
        log.warning(
            "%slearning_rate=%g rises to final_learning_rate=%g: lower that as well, or set schedule='constant'",
            prefix, section.learning_rate, section.final_learning_rate,
        )  # fmt: skip


def _tell_early_generator(adversary: AdversaryConfig) -> None:
    generator, start = adversary.generator_start_steps, adversary.start_steps
    if adversary.discriminator != "none" and generator < start:
        log.warning(
            "adversary.generator_start_steps=%d is before adversary.start_steps=%d: so long the decoder is to fool a "
            "discriminator that has learned nothing",
            generator, start,
        )  # fmt: skip


def from_json(text: str, schema: type[SectionT] = Config) -> SectionT:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"the config is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"the config is a JSON {type(values).__name__}, expected an object")
    return from_dict(schema, values)


def to_json(config: Section) -> str:
    return config.model_dump_json(indent=2)


def defaults() -> ml_collections.ConfigDict:
    """Every default as the editable tree that config files change and flags override."""
    return _editable(Config())


def parse_decoder_and_size(text: str) -> tuple[str, int]:
    """The argument of a config file, "decoder,pixels": `configs/dinov2_b.py:ViT-L,512` -> ("ViT-L", 512)."""
    decoder, _, pixels = text.partition(",")
    if not decoder or not pixels.isdigit() or int(pixels) % 16 or int(pixels) == 0:
        raise ConfigError(f"{text!r} is no decoder and picture size, as in ViT-XL,256 (a multiple of 16)")
    return decoder, int(pixels)


def _editable(section: Section) -> ml_collections.ConfigDict:
    tree = ml_collections.ConfigDict(type_safe=False)  # types are checked against the schema, with better messages
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if type(None) in typing.get_args(field.annotation):  # a file may say None, and a flag another value after it
            kind = _type_of_text(field.annotation) if value is None else type(value)
            value = ml_collections.FieldReference(value, field_type=kind)
        tree[name] = _editable(value) if isinstance(value, Section) else value
    return tree


def _type_of_text(annotation: Any) -> type:
    """What the text of a flag becomes where None is the default: that of `Positive | None` an int."""
    kinds = [arg.__origin__ if hasattr(arg, "__metadata__") else arg for arg in typing.get_args(annotation)]
    return next((kind for kind in (int, float) if kind in kinds), str)


def check_field(schema: type[Section], path: str) -> None:
    """Raises ConfigError if `path` (as in "model.num_embeddings") names no field, with the nearest that does."""
    at: Any = schema
    parts = path.split(".")
    for i, part in enumerate(parts):
        if not (isinstance(at, type) and issubclass(at, Section)):
            return  # inside a free-form field
        if part not in at.model_fields:
            raise ConfigError(_unknown(at, parts[:i], part))
        at = at.model_fields[part].annotation


def _unknown(section: type[Section], path: list[str], name: str) -> str:
    known = list(section.model_fields)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {'.'.join([*path, near[0]])}?" if near else f"known here: {', '.join(known)}"
    return f"unknown config field {'.'.join([*path, name])}: {hint}"


def _explain(schema: type[Section], error: dict[str, Any]) -> str:
    path = [str(part) for part in error["loc"]]
    name = ".".join(path) or "config"
    if error["type"] == "extra_forbidden":
        return _unknown(_section_at(schema, path[:-1]), path[:-1], path[-1])
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{name}: {message}"
    return f"{name}={error['input']!r}: {message}"


def _section_at(schema: type[Section], path: list[str]) -> type[Section]:
    for part in path:
        schema = schema.model_fields[part].annotation
    return schema
