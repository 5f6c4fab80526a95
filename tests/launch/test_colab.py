"""The notebook, run from top to bottom where its kernel is installed (the `notebook` extra)."""

import ast
import json
import os
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOK = ROOT / "launch" / "colab.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def parameters():
    (cell,) = [c for c in CODE if "parameters" in c["metadata"].get("tags", ())]
    return cell


def test_git_has_no_outputs():
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)


def test_every_cell_is_python():
    for cell in CODE:
        ast.parse("".join(cell["source"]))


def test_what_it_asks_of_the_user_has_defaults():
    names = re.findall(r"^(\w+) = ", "".join(parameters()["source"]), re.M)
    assert names == ["REPOSITORY", "TOKENIZER", "STEPS", "WORKDIR"]


def run(values, folder):
    """Runs it in a kernel of its own with other parameters; returns its notebook with outputs."""
    nbclient = pytest.importorskip("nbclient", reason="the notebook extra is not installed")
    pytest.importorskip("ipykernel", reason="the notebook extra is not installed")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())]
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in values.items())
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    return client.execute(env=os.environ | {"XLA_FLAGS": ""})  # one device, as most notebooks have


@pytest.mark.parametrize("start", ["of a tokenizer", pytest.param("of its own training", marks=pytest.mark.slow)])
def test_it_runs_from_top_to_bottom(trained, tmp_path, start):
    given = {"TOKENIZER": str(trained)} if start == "of a tokenizer" else {"STEPS": 8, "WORKDIR": str(tmp_path / "run")}
    done = run(given, NOTEBOOK.parent)
    kinds = [
        kind for cell in done.cells if cell.cell_type == "code" for o in cell.outputs for kind in o.get("data", {})
    ]
    assert kinds.count("image/png") == 5
    printed = "".join(o.get("text", "") for c in done.cells if c.cell_type == "code" for o in c.outputs)
    assert "bits per picture" in printed
    assert len(re.findall(r"pictures per second", printed)) == 4


def test_outside_a_checkout_it_asks_for_the_repository(tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="the notebook extra is not installed")
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="set REPOSITORY"):
        run({}, tmp_path)
