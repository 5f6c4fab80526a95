"""What all commands of this room do alike: settings of the process, errors in one line, exit codes, progress.

Exit codes: 0 done, 1 something given cannot be used (one line on standard error says what), 2 wrong arguments, 130
interrupted. A bug keeps its traceback.
"""

import argparse
import io
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from vqrae_jax import runtime
from vqrae_jax.errors import UserError

T = TypeVar("T")

CHECKPOINT = "workdir of a run, one of its checkpoints, an exported folder (each here or in gs://), or a hub id"


def run(action: Callable[[], Any], level: int = logging.WARNING) -> None:
    """Runs a command; leaves the process by `sys.exit` unless all is well."""
    logging.basicConfig(level=level, format="%(levelname)s %(message)s", force=True)  # a library may have been first
    if isinstance(sys.stdout, io.TextIOWrapper):  # as standard error is: a file's name may be none of its encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        runtime.start()
        action()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def at_least_1(text: str) -> int:
    """The type of an argument that counts something; argparse tells which one it is."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of at least 1")
    return int(text)


def progress(items: Iterable[T], total: int, what: str, size: Callable[[T], int] = lambda _: 1) -> Iterator[T]:
    """`items` with a progress bar on standard error, where that is a terminal.

    Args:
      total: in the unit of `size`, which says how far an item goes.
      what: a word for the bar.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        for item in items:
            yield item
            bar.advance(task, size(item))
