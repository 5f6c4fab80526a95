"""Building configs from plain values, Python files and JSON, with one error for everything that is invalid."""

import difflib
import importlib.machinery
import importlib.util
import inspect
import json
import os
import traceback
import typing
from collections.abc import Callable
from typing import Any

import ml_collections
import pydantic

from vqrae_jax.config.schema import Config, ModelConfig, Section
from vqrae_jax.errors import ConfigError

SectionT = typing.TypeVar("SectionT", bound=Section)

# Fields in configs that earlier versions saved: their present names, None for fields without an effect.
_EARLIER_FIELDS = {
    "model": {"scan_layers": None},
    "evaluation": {"figures": "metrics", "training_figures": "training_metrics", "pictures": "examples"},
    "train": {"pictures": "log_images"},
}


def from_dict(schema: type[SectionT], values: dict[str, Any], rename: Callable = lambda error: error) -> SectionT:
    """Builds a section from plain values; `rename` changes the errors of single fields.

    Raises:
      ConfigError: lists every unknown, missing or invalid field, with the nearest known name.
    """
    try:
        return schema.model_validate(values)
    except pydantic.ValidationError as error:
        errors = [rename(_explain(schema, e)) for e in error.errors()]
    if len(errors) == 1:
        raise errors[0]
    raise ConfigError("\n".join(map(str, errors)))


def from_saved(schema: type[SectionT], values: dict[str, Any]) -> SectionT:
    """Builds a config or its model section from values that this or an earlier version saved, see `from_dict`."""
    if schema is ModelConfig:
        return from_saved(Config, {"model": values}).model
    renamed = {}
    for section, fields in values.items():
        names = _EARLIER_FIELDS.get(section, {}) if isinstance(fields, dict) else {}
        renamed[section] = fields
        if names:
            renamed[section] = {names.get(n, n): value for n, value in fields.items() if names.get(n, n) is not None}
    return from_dict(schema, renamed)


def from_json(text: str, schema: type[SectionT] = Config) -> SectionT:
    """Builds a section from a JSON object, see `from_dict`."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"the config is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"the config is a JSON {type(values).__name__}, expected an object")
    return from_dict(schema, values)


def to_json(config: Section) -> str:
    """Returns a section as JSON, the inverse of `from_json`."""
    return config.model_dump_json(indent=2)


def defaults() -> ml_collections.ConfigDict:
    """Returns every default as an editable tree, which config files change and flags override."""
    return _editable(Config())


def load_config_file(name: str) -> ml_collections.ConfigDict:
    """Returns the result of a config file's get_config(), locked against new fields.

    Args:
      name: "configs/dinov2_b.py", or with an argument of get_config "configs/dinov2_b.py:ViT-L,512".

    Raises:
      ConfigError: no such file, or it does not return a config; with the line.
    """
    path, colon, argument = os.path.expanduser(name).partition(":")
    if not os.path.isfile(path):
        raise ConfigError(f"{path} is not a file on this machine")
    loader = importlib.machinery.SourceFileLoader("config_file", os.path.abspath(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    try:
        loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if get_config is None:
            raise ConfigError(f"{path} has no function get_config, which must return the config")
        line = _definition_line(get_config, path)
        parameters = inspect.signature(get_config).parameters.values()
        if colon and not parameters:
            raise ConfigError(f"{line}: get_config takes no argument, got {argument!r}; use {path} alone")
        if not colon and any(parameter.default is parameter.empty for parameter in parameters):
            raise ConfigError(f"{line}: get_config requires an argument; use {path}:ARGUMENT")
        config = get_config(argument) if colon else get_config()
    except ConfigError:
        raise
    except Exception as error:
        message = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
        raise ConfigError(f"{_error_line(error, path)}: {type(error).__name__}: {message}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(
            f"{line}: get_config returns {type(config).__name__}; change and return the result of "
            "vqrae_jax.config.defaults()"
        )
    return config.lock()


def parse_decoder_and_size(text: str) -> tuple[str, int]:
    """Parses the argument of a config file: `configs/dinov2_b.py:ViT-L,512` has "ViT-L,512" -> ("ViT-L", 512)."""
    decoder, _, pixels = text.partition(",")
    if not decoder or not pixels.isdigit() or int(pixels) % 16 or int(pixels) == 0:
        raise ConfigError(f"{text!r}: expected a decoder and an image size (a multiple of 16), as in ViT-XL,256")
    return decoder, int(pixels)


def check_field(schema: type[Section], path: str) -> None:
    """Raises ConfigError with the nearest known name if `path` (as in "model.num_embeddings") is not a field."""
    section: Any = schema
    parts = path.split(".")
    for i, part in enumerate(parts):
        if not (isinstance(section, type) and issubclass(section, Section)):
            return  # inside a free-form field
        if part not in section.model_fields:
            raise _unknown_field(section, parts[:i], part)
        section = section.model_fields[part].annotation


def _editable(section: Section) -> ml_collections.ConfigDict:
    tree = ml_collections.ConfigDict(type_safe=False)  # types are checked against the schema, with better messages
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        kinds = typing.get_args(field.annotation)
        if type(None) in kinds:  # file and flag may set None and another value in any order; object: any literal
            value = ml_collections.FieldReference(value, field_type=str if str in kinds else object)
        tree[name] = _editable(value) if isinstance(value, Section) else value
    return tree


def _explain(schema: type[Section], error: dict[str, Any]) -> ConfigError:
    path = [str(part) for part in error["loc"]]
    if error["type"] == "extra_forbidden":
        section = schema
        for part in path[:-1]:
            section = section.model_fields[part].annotation
        return _unknown_field(section, path[:-1], path[-1])
    if error["type"] == "field_error":
        context = error["ctx"]
        return ConfigError(context["message"], field=".".join([*path, context["field"]]), value=context["value"])
    name, message = ".".join(path) or "config", error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return ConfigError(message, field=name)
    return ConfigError(message, field=name, value=error["input"])


def _unknown_field(section: type[Section], path: list[str], name: str) -> ConfigError:
    names = list(section.model_fields)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {'.'.join([*path, near[0]])}?" if near else f"known fields: {', '.join(names)}"
    return ConfigError(f"unknown config field; {hint}", field=".".join([*path, name]))


def _error_line(error: Exception, path: str) -> str:
    """Returns file and line of an error: the line of the config file that led to it, or of the invalid syntax."""
    if isinstance(error, SyntaxError) and error.filename and os.path.isfile(error.filename):
        return f"{error.filename}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == os.path.abspath(path)]
    return f"{path}, line {lines[-1]}" if lines else path


def _definition_line(function: Any, path: str) -> str:
    """Returns file and line of a function that the file defines; otherwise the file."""
    code = getattr(function, "__code__", None)
    in_file = code is not None and code.co_filename == os.path.abspath(path)
    return f"{path}, line {code.co_firstlineno}" if in_file else path
