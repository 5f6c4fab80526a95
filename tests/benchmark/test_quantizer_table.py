import json
import math

import numpy as np
import pytest

from vqrae_jax.benchmark import quantizer_table, quantizers
from vqrae_jax.data import images
from vqrae_jax.errors import ConfigError


@pytest.mark.parametrize("codes", quantizer_table.LEVELS)
@pytest.mark.parametrize("grid", [14, 16])
def test_every_row_has_the_bits_of_one_code_per_token(codes, grid):
    bits = grid**2 * math.log2(codes)
    for name, row in quantizer_table.settings(codes, grid, 8).items():
        params = row["quantizer_params"]
        parts = params.get("depth", params.get("groups", 1))
        positions = sum(g**2 for g in params["grids"]) if "grids" in params else parts * grid**2
        size = math.prod(params["levels"]) if "levels" in params else row["num_embeddings"]
        assert 0.99 * bits < positions * math.log2(size) <= bits, name


@pytest.fixture
def arguments(golden, tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 32), ("val", 3)):
        (tmp_path / split).mkdir()
        for i in range(count):
            images.write_image(tmp_path / split / f"{i}.png", rng.integers(0, 256, (56, 56, 3)).astype(np.uint8))
    return [f"--images={tmp_path}", f"--encoder={golden / 'encoders' / 'dinov2'}", "--size=56", f"--output={tmp_path}"]


def test_the_command_writes_the_table(arguments, tmp_path, capsys):
    quantizers.main([*arguments, "--steps=2", "--quantizers=k-means,lfq"])
    told = json.loads((tmp_path / "table.json").read_text())
    rows = {row["quantizer"]: row for row in told["rows"]}
    assert list(rows) == ["none", "k-means", "lfq"]
    assert told["train_images"], told["val_images"] == (32, 3)
    assert rows["none"]["error / variance"] == 0 == rows["none"]["time / none"] - 1
    # Each of the 512 tokens may have a code of its own, and those of the other images are near none of them.
    assert 0 < rows["k-means"]["error / variance"] < 2
    assert rows["lfq"]["error / variance"] is None
    assert all(0 < row["PSNR, dB"] < 30 and row["ms per step"] > 0 for row in rows.values())
    table = (tmp_path / "table.md").read_text().splitlines()
    assert len(table) == 5
    assert table[2] in capsys.readouterr().out


@pytest.mark.slow
def test_the_row_of_k_means_keeps_the_codes_it_is_given(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(quantizer_table, "lloyd", lambda z, size: np.zeros((size, z.shape[-1]), np.float32))
    quantizers.main([*arguments, "--steps=1", "--quantizers=k-means"])
    assert json.loads((tmp_path / "table.json").read_text())["rows"][1]["use"] == 1 / 2048


def test_rows_that_do_not_exist_are_named(arguments):
    with pytest.raises(ConfigError, match="--quantizers=emu: choose from none,k-means,ema,"):
        quantizers.main([*arguments, "--quantizers=emu,ema"])
    with pytest.raises(ConfigError, match=r"--codes=100.*2048 and 8192"):
        quantizers.main([*arguments, "--codes=100"])
