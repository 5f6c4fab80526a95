"""Config files, Python as in configs/, and what a command line changes of them."""

import importlib.machinery
import importlib.util
import inspect
import os
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from vqrae_jax.errors import ConfigError


def load_config_file(given: str) -> ml_collections.ConfigDict:
    """What get_config() of a config file returns; new fields can no longer be added.

    Args:
      given: "configs/dinov2_b.py", or with an argument for get_config "configs/dinov2_b.py:ViT-L,512".

    Raises:
      ConfigError: the file is not there or makes no config; with the line.
    """
    path, colon, argument = given.partition(":")
    if not os.path.isfile(path):
        raise ConfigError(f"{path} is no file on this machine")
    loader = importlib.machinery.SourceFileLoader("config_file", os.path.abspath(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    try:
        loader.exec_module(module)
        make = getattr(module, "get_config", None)
        if make is None:
            raise ConfigError(f"{path} has no function get_config, which returns the config")
        line = _defined(make, path)
        accepted = inspect.signature(make).parameters.values()
        if colon and not accepted:
            raise ConfigError(f"{line}: get_config takes no argument {argument!r}: give {path} alone")
        if not colon and any(parameter.default is parameter.empty for parameter in accepted):
            raise ConfigError(f"{line}: get_config wants an argument: give {path}:ARGUMENT")
        config = make(argument) if colon else make()
    except ConfigError:
        raise
    except Exception as error:
        said = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
        raise ConfigError(f"{_place(error, path)}: {type(error).__name__}: {said}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(
            f"{line}: get_config returns a {type(config).__name__}; change and return what config.defaults() of "
            "vqrae_jax gives"
        )
    return config.lock()


def prefer_command_line_steps(values: dict[str, Any], given: Mapping[str, Any]) -> str:
    """Takes epochs out of `values` where the same was given in steps, and says so; "" where there is nothing to say.

    A file's epochs would else go before the steps of whoever wants a short trial of it.

    Args:
      values: of a config, nested.
      given: what of them the command line says, by path: {"train.steps": 1000}.

    Raises:
      ConfigError: the command line gives both.
    """
    left_out = []
    for name, steps in given.items():
        epochs = f"{name.removesuffix('steps')}epochs"
        before = _get(values, epochs) if name.endswith("steps") else None
        if before is None:
            continue
        if epochs in given:
            raise ConfigError(f"{name}={steps} and {epochs}={before} are both given: leave one of them out")
        _section(values, epochs)[epochs.rpartition(".")[2]] = None
        left_out.append(f"{epochs}={before}")
    if not left_out:
        return ""
    rest = [f"{name}={value}" for name, value in _epochs(values)]
    still = f"; still in epochs: {', '.join(rest)}" if rest else ""
    return f"steps of the command line go before the config file's {', '.join(left_out)}{still}"


def _place(error: Exception, path: str) -> str:
    """File and line of a mistake: that of the config file which led to it, or where Python cannot read on."""
    if isinstance(error, SyntaxError) and error.filename and os.path.isfile(error.filename):
        return f"{error.filename}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == os.path.abspath(path)]
    return f"{path}, line {lines[-1]}" if lines else path


def _defined(function: Any, path: str) -> str:
    """File and line of a function, as far as it is of that file."""
    code = getattr(function, "__code__", None)
    here = code is not None and code.co_filename == os.path.abspath(path)
    return f"{path}, line {code.co_firstlineno}" if here else path


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    for part in name.split(".")[:-1]:
        values = values.get(part, {})
    return values


def _get(values: dict[str, Any], name: str) -> Any:
    return _section(values, name).get(name.rpartition(".")[2])


def _epochs(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field that is in epochs, by path."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _epochs(value, f"{prefix}{name}.")
        elif name.endswith("epochs") and value is not None:
            yield f"{prefix}{name}", value
