import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from vqrae_jax import Generator, Tokenizer
from vqrae_jax.commands import inspect
from vqrae_jax.errors import CheckpointError
from vqrae_jax.inference.location import locate


def run(path, *arguments):
    return inspect.inspect(inspect.parser.parse_args([f"--checkpoint={path}", *arguments]))


def test_a_run_and_the_folder_saved_from_it_have_the_same_description(trained, tmp_path, capsys):
    tokenizer = Tokenizer.load(trained)
    run_, saved = run(trained, "--hash"), run(tokenizer.save_pretrained(tmp_path / "saved"), "--hash")
    for name in ("model", "parameters", "hash", "metrics"):
        assert run_[name] == saved[name]
    assert run_["hash"] == tokenizer.hash
    assert (run_["kind"], saved["kind"]) == ("checkpoint", "exported folder")
    encoder = sum(np.size(x) for x in jax.tree.leaves(tokenizer.trained["params"]["encoder"]))
    assert run_["parameters"]["encoder"] == encoder
    assert run_["model"]["bits per image"] == 80
    assert run_["provenance"]["step"] == 3
    output = capsys.readouterr().out
    assert "model.codebook size" in output
    assert "config.train.steps" in output


@pytest.mark.slow
def test_a_generator_is_described_too(trained_generator, tmp_path):
    run_ = run(trained_generator)
    saved = run(Generator.load(trained_generator).save_pretrained(tmp_path / "saved"))
    assert run_["model"] == saved["model"]
    assert run_["tokenizer"] == saved["tokenizer"]
    assert run_["parameters"]["total"] == saved["parameters"]["total"] > 1000
    assert "eval/bits_per_code" in run_["metrics"]


def test_the_model_comes_first_and_nothing_twice(trained, tmp_path, capsys):
    workdir = shutil.copytree(trained, tmp_path / "run")
    protocol = {"crop": "central square", "model": {"quantizer": "ema"}}
    evaluation = {"step": 3, "metrics": {"eval/psnr": 9.0}, "remarks": [], "protocol": protocol}
    (workdir / "evaluation.json").write_text(json.dumps(evaluation))
    assert run(workdir)["protocol"] == protocol
    output = capsys.readouterr().out
    order = [output.index(name) for name in ("model.grid", "metrics.eval/psnr", "config.train.steps", "protocol.crop")]
    assert order == sorted(order)
    assert "protocol.model" not in output
    run(workdir, "--json", "--config")
    assert json.loads(capsys.readouterr().out)["config"]["model"]["commitment_cost"] == 0.25


def test_the_encoder_is_the_one_that_was_read(untrained, golden, tmp_path):
    path = str(golden / "encoders" / "dinov2")
    params = untrained().config.encoder_params.model_copy(update={"dinov2_path": path})
    update = {"encoder_config_path": "facebook/dinov2-base", "encoder_params": params}
    location = locate(str(untrained().save_pretrained(tmp_path / "saved")))
    location = dataclasses.replace(location, config=location.config.model_copy(update=update), frozen=True)
    assert inspect._describe_tokenizer(location)["encoder"] == path


def test_a_folder_without_its_encoder_is_described_as_far_as_possible_and_an_empty_one_is_an_error(untrained, tmp_path):
    folder = untrained().save_pretrained(tmp_path / "saved")
    file = folder / "config.json"
    config = json.loads(file.read_text().replace(untrained().config.encoder_config_path, "/missing"))
    file.write_text(json.dumps({name: value for name, value in config.items() if name != "sha256"}))
    description = run(folder)
    assert "/missing" in description["encoder"]
    assert description["parameters"]["params/decoder"] > 0
    with pytest.raises(CheckpointError):
        run(tmp_path)
