"""The errors that a user can correct: raised anywhere, formatted here, printed by `main` and by the commands.

A message is one or two plain sentences: what is wrong, what is accepted, what to do. The field (or argument, or file)
and its value are data, so that a command can report its own argument in place of the config field behind it.
"""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

NO_VALUE: Any = object()


class UserError(Exception):
    """Input, a setting or a resource that the user can correct.

    Attributes:
      message: what is wrong and what to do, without the field.
      field: the config field, argument or file that is wrong, for example "data.image_size"; None where none is.
      value: its value; NO_VALUE where the message does not need it.
      exit_code: of a program that ends with this error. 2: flags or settings that fail at every attempt, so launchers
        give up; 1: anything that another attempt may find corrected (files, buckets, other processes).
    """

    exit_code = 1

    def __init__(self, message: str, *, field: str | None = None, value: Any = NO_VALUE, exit_code: int | None = None):
        super().__init__(message)
        self.message, self.field, self.value = message, field, value
        if exit_code is not None:
            self.exit_code = exit_code

    def __str__(self) -> str:
        if self.field is None:
            return self.message
        try:
            value = "" if self.value is NO_VALUE else f"={self.value!r}"
        except ValueError:  # Python does not print integers of more than 4,300 digits
            value = ""
        return f"{self.field}{value}: {self.message}"

    def renamed(self, names: Mapping[str, str]) -> "UserError":
        """Returns the same error about the field that `names` maps its field to; itself where it maps none."""
        if self.field not in names:
            return self
        return type(self)(self.message, field=names[self.field], value=self.value, exit_code=self.exit_code)


class ConfigError(UserError, ValueError):
    """A setting, flag or argument that is invalid by itself, whatever lies on disks."""

    exit_code = 2


class DataError(UserError, ValueError):
    """Images, codes, arrays or datasets that cannot be used."""


class ImageError(DataError):
    """One image that is damaged or missing. Pipelines skip it, a single read raises it.

    A disk or bucket that refuses access raises OSError or StorageError instead: the image itself may be intact.
    """


class WeightsError(UserError, ValueError):
    """Pretrained weights, or their description, that cannot be used."""


class StorageError(UserError):
    """A folder or bucket that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written, or does not fit this config."""


class DamagedError(CheckpointError):
    """A checkpoint that has its name but not its content."""


class DistributedError(UserError):
    """Processes of one run that cannot work together; every process raises it."""


class InstallError(UserError, ImportError):
    """A package of an optional feature that is not installed."""

    exit_code = 2


@contextlib.contextmanager
def report_errors() -> Iterator[None]:
    """Ends the program with one line on standard error and an exit code if a UserError or OSError is raised in it."""
    try:
        yield
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def import_extra(extra: str, feature: str) -> Iterator[None]:
    """Converts the error of a missing package to one that says what to install.

    Args:
      extra: optional dependencies in pyproject.toml that contain the packages imported in the block.
      feature: what needs them, the subject of the message.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).partition(".")[0]
        message = f"{feature} needs {package}, which is not installed: pip install 'vqrae-jax[{extra}]'"
        raise InstallError(message) from error


def first_line(error: BaseException) -> str:
    """Returns the first line of another library's error, at most 300 characters."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")[:300]
