"""The whole preflight: for pretended CPUs always, for a TPU where libtpu is installed."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from vqrae_jax.errors import ConfigError
from vqrae_jax.preflight import command
from vqrae_jax.preflight.alternatives import alternatives, way
from vqrae_jax.preflight.chips import parse
from vqrae_jax.preflight.devices import has_libtpu
from vqrae_jax.preflight.programs import Plan, _from_error
from vqrae_jax.preflight.report import _duration

ROOT = pathlib.Path(__file__).parents[2]


def main(*arguments):
    """The command as it is typed, on a machine where jax has not been started."""
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": ""}
    done = [sys.executable, "-m", "vqrae_jax.main", "--mode=preflight", *map(str, arguments)]
    return subprocess.run(done, capture_output=True, text=True, cwd=ROOT, env=env)


@pytest.fixture(scope="module")
def report(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("preflight") / "sub" / "report.json"
    found = command.preflight(tiny(mesh={"fsdp_min_size": 1}), "gpu:8xh200", 1, path)
    return found, json.loads(path.read_text())


def test_programs_of_eight_gpus(report, capsys):
    found, saved = report
    assert [c.name for c in found.programs] == ["train", "evaluate", "tokenize"]
    assert found.fits
    train, evaluate, tokenize = saved["programs"]
    assert train["memory"]["arguments"] > evaluate["memory"]["arguments"] > tokenize["memory"]["arguments"]
    assert train["peak"] == sum(train["memory"].values()) < saved["capacity"] == 141e9
    assert train["flops"] == sum(train["parts"].values())
    assert train["parts"]["decoder backward"] == 2 * train["parts"]["decoder"]
    assert evaluate["parts"]["decoder"] / evaluate["images"] == train["parts"]["decoder"] / train["images"]
    assert train["images_per_second"] == pytest.approx(8 / train["seconds"])
    assert train["images_per_second_without_overlap"] <= train["images_per_second"]
    assert tokenize["collectives"] == []
    assert saved["others"][0]["remat"]
    assert saved["fits"]
    found.print()
    printed = capsys.readouterr().out
    for word in (
        "arguments",
        "temporaries",
        "all-reduce",
        "binds",
        "images/s",
        "weak scaling",
        "data x model",
        "seconds if sending",
    ):
        assert word in printed


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.0290, "0.029 seconds"), (99, "99 seconds"), (100, "1.67 minutes"), (7200, "2 hours"), (3.6e6, "1,000 hours")],
)
def test_times_have_the_unit_of_their_size(seconds, told):
    assert _duration(seconds) == told


def test_one_program_that_does_not_fit_is_enough(report, capsys):
    found, _ = report
    train, *rest = found.programs
    short = dataclasses.replace(found, programs=[train, *(dataclasses.replace(c, fits=False) for c in rest)])
    assert not short.fits
    short.print()
    assert "DOES NOT FIT: evaluate and tokenize" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_does_not_fit_exits_with_1(tmp_path):
    """A batch of half a million pictures: shapes only, so it compiles like any other."""
    path = tmp_path / "preflight.json"
    huge = [f"--config.data.{name}={2**19}" for name in ("batch_size", "eval_batch_size")]
    done = main(
        "--config=configs/quickstart.py", "--topology=cpu:2", f"--workdir={tmp_path}", "--alternatives=0", *huge
    )
    assert done.returncode == 1, done.stderr
    assert "DOES NOT FIT: train and evaluate and tokenize" in done.stdout
    assert not json.loads(path.read_text())["fits"]


def test_input_errors_come_before_any_compilation(tiny):
    done = main("--config=configs/quickstart.py", "--topology=v5e:3x3")
    assert done.returncode == 2  # 1 is of what does not fit
    assert "v5e:16x16" in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(ConfigError, match="does not divide"):
        command.preflight(tiny(mesh={"model": 3}), "cpu:8")
    with pytest.raises(ConfigError, match=r"data\.image_size"):
        command.preflight(tiny(data={"image_size": 48}), "cpu:8")


@pytest.mark.parametrize("name", ["dinov2_b", pytest.param("rae_dinov2_b", marks=pytest.mark.slow)])
def test_configs_of_released_encoders_need_no_hub(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from vqrae_jax.config import Config, from_dict

    plan = Plan.make(from_dict(Config, module.get_config().to_dict()), parse("cpu:8"), jax.devices()[:8])
    assert plan.arguments() > 1e9
    assert len(plan.programs()) == (2 if name.startswith("rae") else 3)


def test_alternatives_save_memory_where_it_is_short(tiny):
    base = tiny(mesh={"model": 1})
    short = [way(config, 8) for config in alternatives(base, False)]
    assert all(w.remat for w in short)
    assert {w.accumulate for w in short} == {1, 2}
    assert any(w.model == 2 and w.data == 4 for w in short)
    room = [way(config, 8) for config in alternatives(base, True)]
    assert {w.batch for w in room} == {8, 16}
    assert way(base, 8) not in short + room
    assert {w.attention for w in room} == {"xla"}


def test_a_way_counts_the_devices_of_its_mesh(tiny):
    ways = [way(tiny(mesh={"slices": slices, "model": 2}), 8) for slices in (1, 2)]
    assert [(w.slices, w.data, w.model) for w in ways] == [(1, 4, 2), (2, 2, 2)]


def test_what_the_tpu_compiler_says_of_a_program_that_does_not_fit():
    message = (
        "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (20.50G) exceeds available HBM (15.75G)"
    )
    memory = _from_error(message, 2**30)
    assert (memory.arguments, memory.temporaries) == (2**30, 20.5 * 2**30)
    assert _from_error("RESOURCE_EXHAUSTED: Used 20.50G of 15.75G hbm.", 2**30).peak == 20.5 * 2**30
    assert _from_error("INTERNAL: a bug", 0) is None


@pytest.mark.slow
@pytest.mark.skipif(not has_libtpu(), reason="libtpu is not installed (pip install libtpu)")
@pytest.mark.parametrize(("topology", "chips"), [("v5e:2x4", 8), ("v5p:2x2x2", 8), ("v4:2x2x1", 4), ("v6e:2x2", 4)])
def test_a_tpu_slice(tmp_path, topology, chips):
    path = tmp_path / "report.json"
    done = main("--config=configs/quickstart.py", f"--topology={topology}", f"--json={path}", "--alternatives=1")
    assert done.returncode == 0, done.stderr
    saved = json.loads(path.read_text())
    assert saved["chips"] == chips
    train = saved["programs"][0]
    assert {axes for _, axes, *_ in train["collectives"]} == {"data"}
    assert min(train["roofline"].values()) > 0
