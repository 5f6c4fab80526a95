import json
import shutil

import jax
import numpy as np
import pytest

from vqrae_jax import Tokenizer
from vqrae_jax.commands import inspect
from vqrae_jax.errors import CheckpointError


def run(path, *arguments):
    return inspect.inspect(inspect.parse([f"--checkpoint={path}", *arguments]))


def test_a_run_and_the_folder_saved_from_it_say_the_same(trained, tmp_path, capsys):
    tokenizer = Tokenizer.load(trained)
    told, saved = run(trained, "--hash"), run(tokenizer.save_pretrained(tmp_path / "saved"), "--hash")
    assert told["model"] == saved["model"]
    assert told["parameters"] == saved["parameters"]
    assert told["hash"] == saved["hash"] == tokenizer.hash
    assert told["figures"] == saved["figures"]
    assert (told["kind"], saved["kind"]) == ("checkpoint", "exported folder")
    encoder = sum(np.size(x) for x in jax.tree.leaves(tokenizer.trained["params"]["encoder"]))
    assert told["parameters"]["encoder"] == encoder
    assert told["model"]["bits per image"] == 80
    assert told["provenance"]["step"] == 3
    shown = capsys.readouterr().out
    assert "model.codebook size" in shown
    assert "config.train.steps" in shown


def test_what_it_is_comes_first_and_nothing_twice(trained, tmp_path, capsys):
    workdir = shutil.copytree(trained, tmp_path / "run")
    protocol = {"crop": "central square", "model": {"quantizer": "ema"}}
    (workdir / "evaluation.json").write_text(
        json.dumps({"step": 3, "figures": {"eval/psnr": 9.0}, "remarks": [], "protocol": protocol})
    )
    assert run(workdir)["protocol"] == protocol
    shown = capsys.readouterr().out
    places = [shown.index(name) for name in ("model.grid", "figures.eval/psnr", "config.train.steps", "protocol.crop")]
    assert places == sorted(places)
    assert "protocol.model" not in shown


def test_json_and_the_whole_config(trained, capsys):
    run(trained, "--json", "--config")
    told = json.loads(capsys.readouterr().out)
    assert told["config"]["model"]["commitment_cost"] == 0.25


def test_an_encoder_that_cannot_be_had_is_told(untrained, tmp_path):
    """The rest of the folder is still described."""
    folder = untrained().save_pretrained(tmp_path / "saved")
    file = folder / "config.json"
    file.write_text(file.read_text().replace(untrained().config.encoder_config_path, "/gone"))
    told = run(folder)
    assert "/gone" in told["encoder"]
    assert told["parameters"]["params/decoder"] > 0


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        run(tmp_path)
