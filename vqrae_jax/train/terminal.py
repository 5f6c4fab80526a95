"""What a run says on the terminal: the progress bar while it trains, a table at its end."""


class Progress:
    """A progress bar on a terminal; elsewhere one line per logged step."""

    def __init__(self, total: int, done: int, active: bool = True):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._console = Console(stderr=True, quiet=not active)
        self._total = total
        self._bar = Bar(
            TextColumn("training"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"), console=self._console, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("training", total=total, completed=done, status="compiling ...")
        self._bar.start()

    def advance(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def status(self, step: int, text: str) -> None:
        self._bar.update(self._task, status=text)
        if not self._console.is_terminal:
            self._console.print(f"step {step}/{self._total}  {text}", highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()


def print_table(title: str, rows: list[tuple[str, str]]) -> None:
    """Two columns, at the end of a run."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    Console().print(table)


def status_line(values: dict[str, float]) -> str:
    """The figures of the log that are shown while a run trains."""
    parts = [f"{n.removeprefix('loss/')} {values[n]:.4f}" for n in ("loss/total", "loss/pixel", "loss/vq")]
    if "codebook/usage" in values:
        parts.append(f"codes {values['codebook/usage']:.0%}")
    if "images_per_second" in values:
        parts.append(f"{values['images_per_second']:.0f} img/s")
    return "  ".join(parts)
