import argparse
import importlib
import pathlib
import shlex
import subprocess
import sys
import unittest.mock

import pytest

from vqrae_jax.commands import __main__ as vqrae
from vqrae_jax.commands import command_line
from vqrae_jax.errors import CheckpointError, ConfigError, DataError, UserError


def command(name):
    return importlib.import_module(f"vqrae_jax.commands.{name.replace('-', '_')}")


def example(name):
    """Returns the arguments in the docstring."""
    (line,) = [line for line in command(name).__doc__.splitlines() if line.startswith("vqrae ")]
    _, called, *arguments = shlex.split(line)
    assert called == name
    return arguments


def test_every_file_is_a_command_that_the_help_lists_and_an_unknown_one_is_answered_with_the_nearest(capsys):
    files = {file.stem.replace("_", "-") for file in pathlib.Path(command_line.__file__).parent.glob("*.py")}
    assert set(vqrae.COMMANDS) == files - {"--init--", "--main--", "command-line", "same-origin", "generator-tabs"}
    vqrae.main(["--help"])
    output = capsys.readouterr().out
    assert all(f"  {name} " in output for name in vqrae.COMMANDS)
    with pytest.raises(SystemExit) as exit:
        vqrae.main(["tokenise", "--help"])
    assert exit.value.code == 2
    assert "'tokenize'" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "65537", "1000000000", "9" * 5000, "²"])
def test_absurd_counts_are_refused(value, capsys):
    with pytest.raises(SystemExit) as exit:
        command("tokenize").parser.parse_args([f"--batch={value}"])
    assert exit.value.code == 2
    assert "--batch" in capsys.readouterr().err


def test_the_list_of_commands_imports_nothing():
    script = (
        "import sys; from vqrae_jax.commands.__main__ import main; main([])\n"
        "assert not {'jax', 'numpy', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.parametrize("name", vqrae.COMMANDS)
def test_help_fits_a_screen_with_every_default_and_the_example_is_accepted(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as exit:
        vqrae.main([name, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert exit.value.code == 0
    assert lines[0].startswith(f"usage: vqrae {name}")
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 100
    parser = command(name).parser
    assert parser.description
    for option in parser._actions:
        if not option.required and option.default not in (None, False, argparse.SUPPRESS):
            assert "default: " in option.help, option.option_strings
    parser.parse_args(example(name))


@pytest.mark.parametrize("name", vqrae.COMMANDS)
def test_the_home_folder_is_expanded_in_every_text(name, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    parser = command(name).parser
    texts = [option for option in parser._actions if option.nargs != 0 and not option.type and not option.choices]
    assert texts
    for option in texts:
        assert parser._get_values(option, ["~/x"]) in ("/home/someone/x", ["/home/someone/x"]), option.dest


@pytest.mark.parametrize("name", vqrae.COMMANDS)
def test_outputs_are_judged_by_what_exists_before_any_work(name, tmp_path):
    module = command(name)
    if "--output" not in module.parser._option_string_actions:
        pytest.skip(f"{name} has no --output: it writes nothing that could exist before")
    action = getattr(module, "report", None) or getattr(module, name.replace("-", "_"))
    suffixes = {"plot": ".png", "latent-statistics": ".npz", "reference-statistics": ".npz"}
    output = tmp_path / f"a.b{suffixes.get(name, '')}"
    output.mkdir() if name in suffixes else output.touch()
    (tmp_path / "file").touch()
    for path in (output, tmp_path / "file" / output.name):
        with pytest.raises(UserError) as error:
            action(module.parser.parse_args([*example(name), f"--output={path}"]))
        assert (error.value.field, error.value.value) == ("--output", str(path))


def test_outputs_must_be_writable(tmp_path, monkeypatch):
    monkeypatch.setattr(command_line.os, "access", lambda path, mode: path != tmp_path)
    for check in (command_line.output_folder, command_line.output_file):
        with pytest.raises(DataError) as error:
            check(str(tmp_path / "new" / "name"))
        assert error.value.field == "--output"


@pytest.mark.parametrize(("name", "argument"), [("demo", "max-upload"), ("detokenize", "batch"), ("tokenize", "limit")])
def test_counts_are_at_least_one(name, argument, capsys):
    for value in ("0", "-1", "1.5", "many"):
        with pytest.raises(SystemExit) as exit:
            command(name).parser.parse_args([*example(name), f"--{argument}={value}"])
        assert exit.value.code == 2
        assert f"argument --{argument}: '{value}'" in capsys.readouterr().err


def test_errors_are_one_line_and_an_exit_code_but_a_bug_keeps_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr(command_line.runtime, "start", lambda: None)
    command_line.run(lambda: None)
    for error, code, message in (
        (DataError("bad", field="--data", value=1), 1, "error: --data=1: bad\n"),
        (ConfigError("bad"), 2, "error: bad\n"),
        (OSError("bad"), 1, "error: bad\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ):
        action = unittest.mock.Mock(side_effect=error)
        with pytest.raises(SystemExit) as exit:
            command_line.run(action)
        assert (exit.value.code, capsys.readouterr().err) == (code, message)
    with pytest.raises(ZeroDivisionError):
        command_line.run(lambda: 1 / 0)


@pytest.mark.slow
def test_a_process_reports_a_missing_checkpoint_in_one_line(tmp_path):
    arguments = ["-m", "vqrae_jax.commands.export", "--format=safetensors", f"--output={tmp_path}"]
    arguments.append(f"--checkpoint={tmp_path / 'missing'}")
    process = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    (line,) = [line for line in process.stderr.splitlines() if " INFO " not in line]
    assert process.returncode == 1
    assert line.startswith("error: ")


@pytest.mark.parametrize("name", ["tokenize", "reconstruct", "evaluate", "export"])
def test_commands_of_tokenizers_name_the_command_of_generators(name, trained_generator, photos, tmp_path):
    inputs = {
        "tokenize": f"--data={photos}", "evaluate": f"--images={photos}", "reconstruct": f"--image={photos}",
        "export": "--format=safetensors",
    }  # fmt: skip
    arguments = ["--checkpoint", str(trained_generator), inputs[name]]
    arguments += [f"--output={tmp_path / 'new'}"] if name != "evaluate" else []
    module = command(name)
    with pytest.raises(CheckpointError) as error:
        getattr(module, name)(module.parser.parse_args(arguments))
    assert error.value.field == "checkpoint"
    assert "vqrae generate" in str(error.value)
