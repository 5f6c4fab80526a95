import importlib.util
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from vqrae_jax.data import codes
from vqrae_jax.data.code_shards import Columns

FOLDER = pathlib.Path(__file__).parents[2] / "examples"
OPTIONAL = {"codes_torch": "torch", "codes_datasets": "datasets"}  # example -> a library that it needs


def example(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_codes(folder, codebook_size, side, code):
    """Writes ten images whose codes are a function of the indices of image and position, in parquet shards."""
    plan = codes.Plan("0" * 64, "invented", 10, "one", (side, side), "uint16", codebook_size, 32, "parquet", 4)
    for shard in codes.start_dataset(folder, plan):
        index = np.arange(*plan.image_range(shard))
        grids = code(index[:, None, None], np.arange(side**2).reshape(side, side)).astype(np.uint16)
        columns = Columns(index, [f"{i}.png" for i in index], (index % 3).astype(np.int32), grids)
        codes.write_shard(folder, plan, shard, columns)
    codes.finish_dataset(folder, plan)
    return folder


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory):
    """The tens of a code are the image, the ones the position."""
    return write_codes(tmp_path_factory.mktemp("codes"), 100, 2, lambda i, n: i * 10 + n)


def test_grain_reads_every_record_once_per_epoch_and_resumes(tokenized):
    module = example("codes_grain")
    batches = module.batches(str(tokenized), 5)
    first = next(batches)
    state = batches.get_state()
    second = next(batches)
    assert sorted([*first["codes"][:, 0, 0], *second["codes"][:, 0, 0]]) == [10 * i for i in range(10)]
    np.testing.assert_array_equal(first["label"], first["codes"][:, 0, 0] // 10 % 3)
    resumed = module.batches(str(tokenized), 5)
    resumed.set_state(state)
    np.testing.assert_array_equal(next(resumed)["codes"], second["codes"])


def test_reading_needs_no_jax(tokenized):
    script = (
        "import sys\nfrom vqrae_jax.data.codes import Codes\n"
        f"dataset = Codes({str(tokenized)!r})\nassert len(dataset) == 10 and dataset[3]['codes'][0, 1] == 31\n"
        "assert not {'jax', 'flax', 'grain', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=FOLDER.parent)


@pytest.mark.slow
def test_scripts_start_in_another_folder(tokenized, run_elsewhere, tmp_path):
    """Imports of all examples work as scripts outside the checkout; one of them runs."""
    names = ["invert_an_image"]
    names += [name for name, library in OPTIONAL.items() if importlib.util.find_spec(library)]
    script = f"""
import runpy, sys
for name in {names}:
    runpy.run_path({str(FOLDER)!r} + f"/{{name}}.py")
sys.argv[1] = {str(tokenized)!r}
runpy.run_path({str(FOLDER / "codes_grain.py")!r}, run_name="__main__")
"""
    assert "(4, 2, 2)" in run_elsewhere("-c", script, "codes", folder=tmp_path)


def test_pytorch(tokenized):
    pytest.importorskip("torch")
    grid, label = example("codes_torch").CodeDataset(str(tokenized))[7]
    assert (grid.tolist(), label) == ([[70, 71], [72, 73]], 1)


def test_hugging_face_datasets(tokenized, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    pytest.importorskip("datasets")
    record = example("codes_datasets").load(str(tokenized))[7]
    assert (record["codes"].tolist(), record["id"]) == ([[70, 71], [72, 73]], "7.png")


def test_the_decoder_is_differentiable(untrained):
    image = np.random.default_rng(0).uniform(size=(1, 32, 32, 3)).astype(np.float32)
    _, errors = example("invert_an_image").invert(untrained(), image, steps=20)
    assert errors[-1] < 0.9 * errors[0]
