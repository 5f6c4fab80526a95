"""All commands of the room: help that fits a screen, exit codes."""

import importlib
import pathlib

import pytest

from vqrae_jax.data.errors import DataError
from vqrae_jax.inference import command

COMMANDS = ("reconstruct", "tokenize", "detokenize", "inspect", "export", "import_origin", "codebook")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_screen(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as left:
        importlib.import_module(f"vqrae_jax.inference.{name}").parse(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert left.value.code == 0
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120


def test_exit_codes(monkeypatch):
    monkeypatch.setattr(command, "enable_compilation_cache", lambda: None)

    def fail(error):
        raise error

    command.run(lambda: None)
    for error, code in ((DataError("what"), "error: what"), (KeyboardInterrupt(), 130)):
        with pytest.raises(SystemExit) as left:
            command.run(lambda error=error: fail(error))
        assert left.value.code == code
    with pytest.raises(ZeroDivisionError):
        command.run(lambda: 1 / 0)


def test_every_command_goes_through_it():
    folder = pathlib.Path(command.__file__).parent
    for file in folder.glob("*.py"):
        text = file.read_text()
        assert "__main__" not in text or "command.run(" in text, file.name
