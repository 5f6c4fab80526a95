"""The whole preflight: for pretended CPUs always, for TPUs if libtpu is installed."""

import dataclasses
import json
import os
import pathlib
import runpy
import subprocess
import sys

import jax
import pytest

from vqrae_jax import runtime
from vqrae_jax.config import Config, from_dict
from vqrae_jax.errors import ConfigError
from vqrae_jax.preflight import command
from vqrae_jax.preflight.chips import parse_topology
from vqrae_jax.preflight.programs import Plan, build_mesh, memory_from_error
from vqrae_jax.preflight.report import _duration

ROOT = pathlib.Path(__file__).parents[2]


def run_main(*arguments):
    """Runs the command in another process, in which JAX has not started."""
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": ""}
    line = [sys.executable, "-m", "vqrae_jax.main", "--mode=preflight", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=env)


def build_plan(config):
    return Plan.build(config, parse_topology("cpu:8"), build_mesh(config, jax.devices()[:8]))


@pytest.fixture(scope="module")
def report(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("preflight") / "sub" / "report.json"
    result = command.preflight(tiny(mesh={"fsdp_min_size": 1}), "gpu:8xh200", 0, path)
    return result, json.loads(path.read_text())


def test_report_of_eight_gpus(report, capsys):
    result, saved = report
    assert [c.name for c in result.programs] == ["train", "evaluate", "tokenize"]
    assert result.fits
    assert saved["fits"]
    train, evaluate, tokenize = saved["programs"]
    assert train["memory"]["arguments"] > evaluate["memory"]["arguments"] > tokenize["memory"]["arguments"]
    assert train["peak"] == sum(train["memory"].values()) < saved["capacity"] == 141e9
    assert train["flops"] == sum(train["parts"].values())
    assert train["parts"]["decoder backward"] == 2 * train["parts"]["decoder"]
    assert evaluate["parts"]["decoder"] / evaluate["images"] == train["parts"]["decoder"] / train["images"]
    assert train["images_per_second"] == pytest.approx(8 / train["seconds"])
    assert train["images_per_second_without_overlap"] <= train["images_per_second"]
    assert tokenize["collectives"] == []
    assert saved["alternatives"] == []
    assert train["utilization"][1] == pytest.approx(train["flops"] / (8 * 9.89e14) / train["seconds"])
    assert "model.dtype" in saved["advice"][0]
    result.print()
    printed = capsys.readouterr().out
    words = "arguments", "temporaries", "all-reduce", "bound by", "images/s", "Weak scaling", "data x model"
    for word in (*words, "Slow: model.dtype"):
        assert word in printed


@pytest.mark.slow
def test_report_of_a_generator_needs_no_data(tiny_generator, tmp_path):
    shape = {"grids": ((4, 4),), "levels": 1, "num_embeddings": 32, "classes": 2, "tokenizer": "nowhere"}
    config = tiny_generator(generator=shape, data={"path": "nowhere", "eval_path": "nowhere"})
    result = command.preflight(config, "gpu:8xh200", 0)
    train, evaluate, generate = result.programs
    assert generate.name == "generate"
    assert train.parts["generator backward"] == pytest.approx(2 * train.parts["generator"], rel=0.3)
    assert evaluate.parts["generator"] / evaluate.images == pytest.approx(8 * train.parts["generator"] / 8, rel=0.01)
    assert generate.parts["generator"] == pytest.approx(
        3 * evaluate.parts["generator"] / 8, rel=0.01
    )  # 3 steps, 8 times
    assert "generator.dtype" in result.advice[0]
    with pytest.raises(ConfigError) as error:
        command.preflight(tiny_generator(), "gpu:8xh200", 0)
    assert error.value.field == "generator.grids"


@pytest.mark.slow
def test_report_of_an_alternative(tiny, tmp_path):
    command.preflight(tiny(mesh={"fsdp_min_size": 1}), "gpu:8xh200", 1, tmp_path / "report.json")
    (other,) = json.loads((tmp_path / "report.json").read_text())["alternatives"]
    assert (other["dtype"], other["remat"]) == ("bfloat16", False)


def test_report_names_the_programs_that_do_not_fit_and_has_readable_durations(report, capsys):
    train, *rest = report[0].programs
    too_large = dataclasses.replace(report[0], programs=[train, *(dataclasses.replace(c, fits=False) for c in rest)])
    assert not too_large.fits
    too_large.print()
    assert "DOES NOT FIT: evaluate and tokenize" in capsys.readouterr().out
    texts = {0.029: "0.029 seconds", 99.0: "99 seconds", 100.0: "1.67 minutes", 7200.0: "2 hours", 3.6e6: "1,000 hours"}
    assert {seconds: _duration(seconds) for seconds in texts} == texts


@pytest.mark.slow
def test_run_that_does_not_fit_exits_with_1(tmp_path):
    huge = [f"--config.data.{name}={2**16}" for name in ("batch_size", "eval_batch_size")]
    options = "--config=configs/quickstart.py", "--topology=cpu:2", f"--workdir={tmp_path}", "--alternatives=0"
    process = run_main(*options, *huge)
    assert process.returncode == 1, process.stderr
    assert "DOES NOT FIT: train and evaluate and tokenize" in process.stdout
    assert not json.loads((tmp_path / "preflight.json").read_text())["fits"]


def test_invalid_requests_are_errors_before_compilation(tiny):
    for sections, topology in (({"mesh": {"model": 3}}, "cpu:8"), ({"data": {"image_size": 48}}, "cpu:8"), ({}, "v5e")):
        with pytest.raises(ConfigError):
            command.preflight(tiny(**sections), topology)


@pytest.mark.parametrize("name", ["dinov2_b", pytest.param("rae_dinov2_b", marks=pytest.mark.slow)])
def test_configs_of_released_encoders_need_no_hub(name):
    module = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))
    plan = build_plan(from_dict(Config, module["get_config"]().to_dict()))
    assert plan.argument_bytes() > 1e9
    assert len(plan.programs()) == (2 if name.startswith("rae") else 3)


def test_alternatives_save_memory_only_if_the_run_does_not_fit_and_setups_divide_the_devices(tiny):
    config = tiny(mesh={"model": 1})
    smaller = list(command.alternatives(config, False))
    assert all(other.model.dtype == "bfloat16" for other in smaller)
    assert all(other.model.remat for other in smaller[1:])
    assert {other.optimizer.accumulate for other in smaller} == {1, 2}
    assert any(other.mesh.model == 2 for other in smaller)
    faster = list(command.alternatives(config, True))
    assert {other.data.batch_size for other in faster} == {8, 16}
    half = faster[0]
    assert (half.model.dtype, half.loss.perceptual.dtype, half.adversary.dtype) == ("bfloat16",) * 3
    assert half not in command.alternatives(half, True)
    assert config not in smaller + faster
    for slices, data in ((1, 4), (2, 2)):
        setup = build_plan(tiny(mesh={"slices": slices, "model": 2})).setup
        assert (setup.slices, setup.data, setup.model) == (slices, data, 2)


def test_memory_is_read_from_the_error_of_the_tpu_compiler():
    message = "RESOURCE_EXHAUSTED: total memory required for HLO temporaries (20.50G) exceeds available HBM (15.75G)"
    memory = memory_from_error(message, 2.0**30)
    assert (memory.arguments, memory.temporaries) == (2**30, 20.5 * 2**30)
    assert memory_from_error("RESOURCE_EXHAUSTED: Used 20.50G of 15.75G hbm.", 2.0**30).peak == 20.5 * 2**30
    assert memory_from_error("INTERNAL: a bug", 0.0) is None


@pytest.mark.slow
@pytest.mark.skipif(not runtime.has_libtpu(), reason="libtpu is not installed (pip install libtpu)")
@pytest.mark.parametrize(("topology", "slices", "devices"), [
    ("v5e:2x4", 1, 8), ("v5p:2x2x2", 1, 8), ("v4:2x2x1", 1, 4), ("v6e:2x2", 1, 4), ("tpu7x:2x2x1", 1, 8),
    ("v5e:2x2", 2, 8),
])  # fmt: skip
def test_tpu_slice(tmp_path, topology, slices, devices):
    path = tmp_path / "report.json"
    options = "--config=configs/quickstart.py", f"--topology={topology}", f"--config.mesh.slices={slices}"
    process = run_main(*options, f"--json={path}", "--alternatives=1")
    assert process.returncode == 0, process.stderr
    saved = json.loads(path.read_text())
    assert saved["devices"] == devices
    train = saved["programs"][0]
    assert {axes for _, axes, *_ in train["collectives"]} == ({"data"} if slices == 1 else {"data", "slice"})
    assert min(train["roofline"].values()) > 0
