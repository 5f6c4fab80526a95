import importlib.util
import json

import numpy as np
import pytest

from vqrae_jax.benchmark import __main__ as benchmark
from vqrae_jax.benchmark import speed, stages
from vqrae_jax.errors import UserError

TINY = ["--encoder=tiny", "--decoder=ViT-Nano", "--codes=32", "--batch=2", "--rounds=1"]


def test_flops_are_those_of_the_architecture():
    """Matrix products of a ViT by hand: patches, per block qkv, attention, out and mlp."""
    given = speed.parse(["encoder", *TINY])
    stage, _ = stages.build("encoder", given)
    width, depth, _ = stages.DINOV2[given.encoder]
    tokens = 1 + 16**2
    block = tokens * width * (4 * width + 2 * 4 * width) + 2 * tokens**2 * width
    patches = (tokens - 1) * 14 * 14 * 3 * width
    resize = 3 * (224 * 256 * 256 + 224 * 224 * 256)  # two matrices, in the cheaper order or the other
    expected = 2 * given.batch * (depth * block + patches)
    assert expected < stage.flops <= expected + 2 * given.batch * resize * 1.2 + 1e7


def test_table_json_and_roofline(tmp_path, capsys):
    benchmark.main(["encoder", "train_step", *TINY, "--share", f"--output={tmp_path}"])
    printed = capsys.readouterr().out
    assert "| train_step |" in printed
    report = json.loads((tmp_path / "speed.json").read_text())
    assert [row["stage"] for row in report["rows"]] == ["encoder", "train_step"]
    assert [row["share"] is None for row in report["rows"]] == [True, False]
    for row in report["rows"]:
        assert row["seconds"] > 0
        np.testing.assert_allclose(row["utilization"], row["tflops"] * 1e12 / report["ceilings"]["flops"])
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("scan", ["--scan", "--no-scan"])
def test_pytorch_is_told_the_same_however_blocks_are_held(scan):
    given = speed.parse(["train_step", *TINY, scan])
    stage, _ = stages.build("train_step", given)
    names = [name for name in stage.tensors if "block" in name or "layer" in name]
    assert len(names) > 20
    assert all(np.ndim(stage.tensors[name]) <= 2 for name in names)


def test_the_step_without_a_quantizer_works_on_the_same_state():
    given = speed.parse(["train_step", *TINY, "--share"])
    stage, _ = stages.build("train_step", given)
    bare = stages.without_quantizer(stage, given)
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


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="compares with PyTorch")
@pytest.mark.parametrize("stage", stages.NAMES)
def test_pytorch_computes_the_same(stage, capsys):
    benchmark.main([stage, *TINY, "--against=pytorch"])  # raises where it does not
    assert "PyTorch eager / ours" in capsys.readouterr().out


def test_another_result_is_no_opponent():
    mine = {"indices": np.array([1.0, 2, 3]), "loss": np.array([0.5])}
    assert speed._difference(mine, mine) == 0
    assert speed._difference(mine, {"indices": np.array([1.0, 2, 4])}) == pytest.approx(1 / 3)
    assert speed._difference(mine, {"loss": np.array([0.25])}) == pytest.approx(1.0)


def test_without_torch_it_says_what_is_missing(tmp_path):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho 'ModuleNotFoundError: No module named torch' >&2\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(UserError, match=r"No module named torch; --torch-python names"):
        benchmark.main(["encoder", *TINY, "--against=pytorch", f"--torch-python={program}"])


def test_unknown_name():
    with pytest.raises(SystemExit, match=r"(?s)usage.*quantizers"):
        benchmark.main(["encode"])
