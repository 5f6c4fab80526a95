"""The progress bar of training and of the commands."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def progress_bar(name: str, *columns: TextColumn, active: bool = True) -> Progress:
    """Returns a rich progress bar on standard error, which is shown only if that is a terminal.

    Args:
      name: the word in front of the bar.
      columns: shown after the time that remains.
      active: False shows nothing, on a terminal either.
    """
    console = Console(stderr=True, quiet=not active)
    return Progress(
        TextColumn(name), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(), *columns,
        console=console, disable=not console.is_terminal,
    )  # fmt: skip
