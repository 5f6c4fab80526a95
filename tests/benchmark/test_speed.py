"""The stages of `vqrae_jax.benchmark`: their FLOPs, the report, and the comparison with PyTorch."""

import importlib.metadata
import importlib.util
import json

import numpy as np
import pytest

from vqrae_jax.benchmark import __main__ as benchmark
from vqrae_jax.benchmark import ceilings, speed, stages
from vqrae_jax.errors import ConfigError

TINY = ["--encoder=tiny", "--decoder=ViT-Nano", "--codes=32", "--batch=2", "--rounds=1"]
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")


def test_flops_are_those_of_the_architecture():
    """Matrix products of a ViT, counted by hand: patches, and per block qkv, attention, output and mlp."""
    args = speed.parse(["encoder", *TINY])
    stage, _ = stages.build("encoder", args)
    width, depth, _ = stages.DINOV2[args.encoder]
    tokens = 1 + 16**2
    block = tokens * width * (4 * width + 2 * 4 * width) + 2 * tokens**2 * width
    patches = (tokens - 1) * 14 * 14 * 3 * width
    resize = 3 * (224 * 256 * 256 + 224 * 224 * 256)  # two products, in either order
    expected = 2 * args.batch * (depth * block + patches)
    assert expected < stage.flops <= expected + 2 * args.batch * resize * 1.2 + 1e7


@pytest.mark.slow
def test_report_has_a_row_per_stage(tmp_path, capsys):
    speed.main(["encoder", "train_step", *TINY, "--share", f"--output={tmp_path}"])
    printed = capsys.readouterr().out
    assert "| train_step |" in printed
    report = json.loads((tmp_path / "speed.json").read_text())
    assert [row["stage"] for row in report["rows"]] == ["encoder", "train_step"]
    assert [row["share"] is None for row in report["rows"]] == [True, False]
    assert {"processor", "device", "jax", "jaxlib", "numpy"} <= set(report["machine"])
    assert all(f"{name} {value}" in printed for name, value in report["machine"].items())
    assert report["ceilings"]["product"] in printed
    for row in report["rows"]:
        assert row["seconds"] > 0
        np.testing.assert_allclose(row["utilization"], row["tflops"] * 1e12 / report["ceilings"]["flops"])
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_step_without_quantizer_shares_the_training_state():
    args = speed.parse(["train_step", *TINY, "--share"])
    stage, _ = stages.build("train_step", args)
    blocks = [x for name, x in stage.tensors.items() if "block" in name or "layer" in name]
    assert blocks
    assert all(np.ndim(x) <= 2 for x in blocks)
    bare = stages.without_quantizer(stage, args)
    stage.call()
    codebook = np.asarray(stage.call.state.batch_stats["quantizer"]["codebook"])
    kernel = np.asarray(stage.call.state.params["decoder"]["pred"]["kernel"])
    assert np.isfinite(bare()["loss"])
    state = stage.call.state
    assert state.step == 2
    assert np.array_equal(state.batch_stats["quantizer"]["codebook"], codebook)
    assert not np.array_equal(state.params["decoder"]["pred"]["kernel"], kernel)
    stage.call()
    assert not np.array_equal(stage.call.state.batch_stats["quantizer"]["codebook"], codebook)


@needs_torch
@pytest.mark.parametrize("stage", [
    pytest.param(name, marks=[] if name == "train_step" else pytest.mark.slow) for name in stages.NAMES
])  # fmt: skip
def test_pytorch_computes_the_same(stage, capsys, monkeypatch):
    if stage != "encoder":  # measure the limits of the machine once
        monkeypatch.setattr(ceilings, "measure_ceilings", lambda *_: ceilings.Ceilings(1.0, 1.0, "fake"))
        versions = {"torch": f"{importlib.metadata.version('torch')} (fake)"}
        monkeypatch.setattr(speed, "measure_pytorch_products", lambda *_: (1.0, versions))
    speed.main([stage, *TINY, "--against=pytorch"])  # raises AssertionError if it does not
    printed = capsys.readouterr().out
    assert "PyTorch eager / ours" in printed
    assert f"torch {importlib.metadata.version('torch').partition('+')[0]}" in printed  # not all builds name a "+cpu"


def test_ceilings_are_the_best_of_all_measurements(monkeypatch):
    slow, fast = ceilings.Ceilings(1.0, 3.0, "slow"), ceilings.Ceilings(2.0, 1.0, "fast")
    assert slow | fast == fast | slow == ceilings.Ceilings(2.0, 3.0, "fast")
    seconds = iter([4.0, 2.0, 8.0, 9.0, 1.0])  # JAX and numpy for two shapes, the copy
    monkeypatch.setattr(ceilings, "_best_seconds", lambda *_: next(seconds))
    best = ceilings.measure_ceilings("float32", [(2, 3, 4), (2, 2, 2)])
    assert (best.flops, best.product) == (2 * 2 * 3 * 4 / 2.0, "numpy, 2 x 4 by 4 x 3")


def test_difference_is_relative_and_a_share_for_indices():
    ours = {"indices": np.array([1.0, 2, 3]), "loss": np.array([0.5])}
    for theirs, expected in ((ours, 0), ({"indices": np.array([1.0, 2, 4])}, 1 / 3), ({"loss": np.array([0.25])}, 1)):
        assert speed.compute_difference(ours, theirs) == pytest.approx(expected)


@pytest.mark.slow
def test_invalid_arguments_and_errors_of_the_pytorch_process_are_reported(tmp_path, capsys):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho 'ModuleNotFoundError: No module named torch' >&2\nexit 1\n")
    program.chmod(0o755)
    arguments = ["encoder", *TINY, "--against=pytorch", f"--torch-python={program}"]
    with pytest.raises(SystemExit) as exit_info:
        benchmark.main(arguments)
    assert exit_info.value.code == 1
    assert "No module named torch" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        benchmark.main(["encode"])
    with pytest.raises(ConfigError) as error:
        speed.main(["train_step", *TINY, "--lpips", "--against=pytorch"])
    assert error.value.field == "--against"
