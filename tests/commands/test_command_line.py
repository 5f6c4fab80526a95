"""All commands of the room: help that fits a screen, exit codes."""

import argparse
import importlib
import pathlib
import shlex

import pytest

from vqrae_jax.commands import command_line as command
from vqrae_jax.errors import DataError

FILES = sorted(pathlib.Path(command.__file__).parent.glob("*.py"))
COMMANDS = [file.stem for file in FILES if '"__main__"' in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_screen(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as left:
        importlib.import_module(f"vqrae_jax.inference.{name}").parse(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert left.value.code == 0
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("name", COMMANDS)
def test_help_tells_every_default_and_says_in_words_what_the_command_does(name, monkeypatch):
    parsers = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda parser, _: parsers.append(parser))
    importlib.import_module(f"vqrae_jax.inference.{name}").parse([])
    (parser,) = parsers
    assert parser.description
    assert "python -m" not in parser.description
    for option in parser._actions:
        if not option.required and option.default not in (None, False, argparse.SUPPRESS):
            assert "default: " in option.help, option.option_strings


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_in_the_docstring_is_one(name):
    module = importlib.import_module(f"vqrae_jax.inference.{name}")
    (line,) = [line for line in module.__doc__.splitlines() if line.startswith("python -m ")]
    _, _, called, *arguments = shlex.split(line)
    assert called == module.__name__
    module.parse(arguments)


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many"])
@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("codebook", "limit"), ("demo", "max_upload"), ("detokenize", "batch"), ("detokenize", "limit"),
        ("latent_statistics", "components"), ("reconstruct", "batch"), ("reference_statistics", "limit"),
        ("tokenize", "limit"), ("tokenize", "shard-size"),
    ],
)  # fmt: skip
def test_what_counts_something_is_at_least_one(name, argument, value, capsys):
    module = importlib.import_module(f"vqrae_jax.inference.{name}")
    (line,) = [line for line in module.__doc__.splitlines() if line.startswith("python -m ")]
    with pytest.raises(SystemExit) as left:
        module.parse([*shlex.split(line)[3:], f"--{argument}={value}"])
    assert left.value.code == 2
    assert f"argument --{argument}: '{value}': give a whole number of at least 1" in capsys.readouterr().err


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
    assert len(COMMANDS) >= 11
    for name in COMMANDS:
        assert "command.run(" in (FILES[0].parent / f"{name}.py").read_text(encoding="utf-8"), name
