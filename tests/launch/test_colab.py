"""The notebook: its committed outputs, and its cells, run from top to bottom for every kind of quantizer."""

import ast
import collections
import importlib.util
import json
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import tomllib

import pytest

from vqrae_jax import config

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOK = ROOT / "launch" / "colab.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
PARAMETERS, INSTALL, TOKENIZER, *REST = range(len(CODE))
SPEED = REST[-1]


def outputs(cells):
    """Returns the number of images and whether text is printed, for each code cell."""
    kinds = [
        collections.Counter(
            kind
            for output in cell["outputs"]
            if output.get("name") != "stderr"
            for kind in output.get("data", {"text": ""})
        )
        for cell in cells
        if cell["cell_type"] == "code"
    ]
    return [(kind["image/jpeg"], bool(kind["text"])) for kind in kinds]


def test_cells_are_python_with_small_outputs_and_parameters():
    for source in CODE:
        ast.parse(source)
    assert re.findall(r"^(\w+) = ", CODE[PARAMETERS], re.M) == ["TOKENIZER", "IMAGES", "STEPS", "WORKDIR", "PACKAGE"]
    assert NOTEBOOK.stat().st_size < 300_000
    text = json.dumps([cell["outputs"] for cell in CELLS if cell["cell_type"] == "code"])
    without_images = re.sub(r'"image/jpeg": "[^"]*"', "", text)
    assert not re.search(r"Traceback|/home/|/tmp/|/root/", text)
    assert not re.search(r"[\s'\"(=:,\[/]/\w+/", without_images), "a path of the machine that ran it"
    assert sum(images for images, _ in outputs(CELLS)) == 7


def test_outside_a_checkout_pip_installs_the_package(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    codes, commands = [0, 1], []

    def install(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, codes.pop(0), "", "no such package")

    monkeypatch.setattr(subprocess, "run", install)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    exec(CODE[INSTALL], {"PACKAGE": "vqrae-jax[train]"})
    assert commands == [[sys.executable, "-m", "pip", "install", "-q", "vqrae-jax[train]", "jax"]]
    with pytest.raises(SystemExit, match="PACKAGE"):
        exec(CODE[INSTALL], {"PACKAGE": "vqrae-jax[train]"})


def test_training_is_that_of_the_quickstart(monkeypatch):
    from vqrae_jax.train import loop

    configs = []
    monkeypatch.setattr(loop, "train", lambda config, workdir: configs.append(config))
    training, _ = CODE[TOKENIZER].split("tokenizer = Tokenizer.load")
    exec(training, {"TOKENIZER": "", "STEPS": 400, "WORKDIR": "runs/quickstart", "sys": sys})
    quickstart = runpy.run_path(str(ROOT / "configs" / "quickstart.py"))["get_config"]()
    assert configs == [config.from_dict(config.Config, quickstart.to_dict())]


def test_badge_leads_to_the_repository():
    """The badge needs an address, which pyproject.toml has once there is one."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    text = (ROOT / "README.md").read_text() + NOTEBOOK.read_text()
    badges = re.findall(r"colab\.research\.google\.com/(github/[\w./-]+)", text)
    path = urls.get("Repository", "").removeprefix("https://github.com/")
    assert badges == ([f"github/{path}/blob/main/launch/colab.ipynb"] * 2 if path else [])


@pytest.mark.slow
@pytest.mark.parametrize("start", ["tokenizer", "training"])
def test_it_runs_in_its_kernel_and_its_outputs_are_current(trained, tmp_path, start):
    nbclient = pytest.importorskip("nbclient", reason="the notebook extra is not installed")
    pytest.importorskip("ipykernel", reason="the notebook extra is not installed")
    notebook = pytest.importorskip("nbformat").read(NOTEBOOK, as_version=4)
    training = {"STEPS": 8, "WORKDIR": str(tmp_path / "run")}
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters = {"TOKENIZER": str(trained)} if start == "tokenizer" else training
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources)
    client.execute(env=os.environ | {"XLA_FLAGS": ""})  # one device, as in most notebooks
    assert outputs(notebook.cells) == outputs(CELLS)


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", ["none", "fsq", "residual", "product", "multiscale"])
def test_cells_adapt_to_the_quantizer(untrained, monkeypatch, quantizer, capsys, tmp_path):
    display = pytest.importorskip("IPython.display", reason="the notebook extra is not installed")
    shown = []
    monkeypatch.setattr(display, "display", shown.append)
    tokenizer, saved = untrained(quantizer=quantizer), tmp_path / "tokenizer"
    if quantizer != "none":
        tokenizer.save_pretrained(saved)
    names = {
        "tokenizer": tokenizer,
        "TOKENIZER": str(saved),
        "IMAGES": [],
        "STEPS": 8,
        "WORKDIR": str(tmp_path / "run"),
    }
    for cell in REST:
        if cell != SPEED or quantizer == "none":
            exec(CODE[cell], names)
    has_levels, has_appearance = quantizer in ("residual", "multiscale"), quantizer == "fsq"
    has_codes, has_positions = quantizer != "none", quantizer not in ("none", "multiscale")
    assert len(shown) == 3 + has_levels + has_appearance + 2 * has_codes + has_positions
    assert "Traceback" not in capsys.readouterr().err
