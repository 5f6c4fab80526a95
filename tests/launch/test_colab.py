"""The notebook, run from top to bottom where its kernel is installed (the `notebook` extra)."""

import ast
import json
import os
import pathlib
import re

import pytest

NOTEBOOK = pathlib.Path(__file__).parents[2] / "launch" / "colab.ipynb"
CODE = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_cells_are_python_without_outputs_and_parameters_have_defaults():
    for cell in CODE:
        ast.parse("".join(cell["source"]))
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
    (cell,) = [cell for cell in CODE if "parameters" in cell["metadata"].get("tags", ())]
    names = re.findall(r"^(\w+) = ", "".join(cell["source"]), re.M)
    assert names == ["REPOSITORY", "TOKENIZER", "STEPS", "WORKDIR"]


def run(parameters, folder):
    """Runs the notebook in its own kernel; returns it with outputs."""
    nbclient = pytest.importorskip("nbclient", reason="the notebook extra is not installed")
    pytest.importorskip("ipykernel", reason="the notebook extra is not installed")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    resources = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources)
    return client.execute(env=os.environ | {"XLA_FLAGS": ""})  # one device, as in most notebooks


@pytest.mark.parametrize("start", ["tokenizer", pytest.param("training", marks=pytest.mark.slow)])
def test_it_runs_from_top_to_bottom(trained, tmp_path, start):
    training = {"STEPS": 8, "WORKDIR": str(tmp_path / "run")}
    notebook = run({"TOKENIZER": str(trained)} if start == "tokenizer" else training, NOTEBOOK.parent)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 5
    printed = "".join(output.get("text", "") for output in outputs)
    assert "bits per image" in printed
    assert printed.count("images per second") == 4


def test_outside_a_checkout_it_needs_the_repository(tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="the notebook extra is not installed")
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="REPOSITORY"):
        run({}, tmp_path)
