"""The scripts of benchmarks/, at tiny sizes."""

import json
import math
import re
import shlex

import numpy as np
import pytest

from benchmarks import (
    codebook_law,
    end_to_end,
    generator_speed,
    gpu,
    latent_table,
    quantizer_table,
    time_to_quality,
    tokenize_folder,
)  # fmt: skip
from vqrae_jax.benchmark import speed
from vqrae_jax.data import images
from vqrae_jax.errors import ConfigError

MEASUREMENTS = [(part, measurement) for part, measurements in gpu.PARTS.items() for measurement in measurements]
PARSE = {gpu.BENCHMARK: speed.parse, gpu.LOOP: end_to_end.parse}


def test_gpu_measurements_are_valid_commands_with_their_own_folders(tmp_path):
    for part, measurement in MEASUREMENTS:
        args = gpu.parse([part, f"--only={measurement.name}", f"--output={tmp_path}"])
        ((_, command),) = gpu.build_commands(args)
        arguments = command[1 + len(measurement.program.split()) :]
        if measurement.program in PARSE:
            PARSE[measurement.program](arguments)
        else:
            assert arguments[0].startswith("--config=configs/cpu_recipe.py")
    assert len({measurement.name for _, measurement in MEASUREMENTS}) == len(MEASUREMENTS)


@pytest.mark.slow
def test_gpu_report_has_results_and_errors(tmp_path, capsys):
    smaller = "--encoder=tiny --batch=2 --rounds=1 --codes=32"
    arguments = [f"--output={tmp_path}", f"--smaller={smaller}"]
    gpu.main(["speed", "--only=tokenize-cudnn", *arguments])
    (result,) = json.loads((tmp_path / "speed.json").read_text())
    assert not result["error"]
    assert result["report"]["rows"][0]["images_per_second"] > 0
    assert "| tokenize-cudnn |" in capsys.readouterr().out
    gpu.main(["recipe", "--only=share,loop", *arguments, "--limit=0"])
    results = json.loads((tmp_path / "recipe.json").read_text())
    assert [bool(result["error"]) for result in results] == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["speed", "recipe"])
def test_gpu_measurements_run(part, tmp_path):
    for measurement in gpu.PARTS[part]:
        smaller = "--encoder=tiny --decoder=ViT-Nano --batch=2 --rounds=1 --codes=32"
        smaller = "--steps=40 --batch=8 --size=32" if measurement.program == gpu.LOOP else smaller
        arguments = [f"--only={measurement.name}", f"--output={tmp_path}", f"--smaller={smaller}", "--limit=300"]
        gpu.main([part, *arguments])
        (result,) = json.loads((tmp_path / f"{part}.json").read_text())
        assert not result["error"], shlex.join(arguments)


@pytest.mark.parametrize("codes", quantizer_table.LEVELS)
@pytest.mark.parametrize("grid", [14, 16])
def test_quantizer_table_rows_have_equal_bits(codes, grid):
    bits = grid**2 * math.log2(codes)
    for name, row in quantizer_table.model_sections(codes, grid, 8).items():
        params = row["quantizer_params"]
        parts = params.get("depth", params.get("groups", 1))
        positions = sum(g**2 for g in params["grids"]) if "grids" in params else parts * grid**2
        size = math.prod(params["levels"]) if "levels" in params else row["num_embeddings"]
        assert 0.99 * bits < positions * math.log2(size) <= bits, name


@pytest.fixture
def arguments(golden, tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 32), ("val", 3)):
        for i in range(count):
            images.write_image(tmp_path / split / f"{i}.png", rng.integers(0, 256, (56, 56, 3)).astype(np.uint8))
    return [f"--images={tmp_path}", f"--encoder={golden / 'encoders' / 'dinov2'}", "--size=56", f"--output={tmp_path}"]


@pytest.mark.slow
def test_quantizer_table_has_the_selected_rows(arguments, tmp_path, capsys):
    quantizer_table.main([*arguments, "--steps=2", "--quantizers=k-means,lfq"])
    report = json.loads((tmp_path / "table.json").read_text())
    rows = {row["quantizer"]: row for row in report["rows"]}
    assert list(rows) == ["none", "k-means", "lfq"]
    assert (report["train_images"], report["val_images"]) == (32, 3)
    assert rows["none"]["error / variance"] == 0 == rows["none"]["time / none"] - 1
    # Each of the 512 training tokens may have its own code, and none of these is near the validation tokens.
    assert 0 < rows["k-means"]["error / variance"] < 2
    assert rows["lfq"]["error / variance"] is None
    assert all(0 < row["PSNR, dB"] < 30 and row["ms per step"] > 0 for row in rows.values())
    table = (tmp_path / "table.md").read_text().splitlines()
    assert len(table) == 5
    assert table[2] in capsys.readouterr().out


@pytest.mark.slow
def test_k_means_row_keeps_its_codebook(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(quantizer_table, "lloyd", lambda z, size, _: np.zeros((size, z.shape[-1]), np.float32))
    quantizer_table.main([*arguments, "--steps=1", "--quantizers=k-means"])
    assert json.loads((tmp_path / "table.json").read_text())["rows"][1]["use"] == 1 / 2048


def test_quantizer_table_rejects_unknown_rows_and_sizes(arguments):
    for flag, value in (("--quantizers", "emu,ema"), ("--codes", 100)):
        with pytest.raises(ConfigError) as error:
            quantizer_table.main([*arguments, f"{flag}={value}"])
        assert (error.value.field, error.value.value) == (flag, value)


@pytest.mark.slow
def test_the_error_falls_with_the_size_of_the_codebook(arguments, tmp_path):
    codebook_law.main([
        *arguments, "--crops=2", "--axes=4", "--batch=64", "--bits=2,5", "--quantizers=Lloyd's k-means;ema;vq",
    ])  # fmt: skip
    rows = json.loads((tmp_path / "law.json").read_text())["rows"]
    assert len(rows) == 6
    for small, large in zip(rows[:3], rows[3:], strict=True):
        assert (small["K"], large["K"]) == (4, 32)
        assert 0 < large["error"] < small["error"] < 1
        assert 0 < large["use"] <= 1
    assert images.read_image(tmp_path / "law.png").std() > 0
    with pytest.raises(ConfigError) as error:
        codebook_law.main([*arguments, "--quantizers=emu"])
    assert error.value.field == "--quantizers"


@pytest.mark.slow
def test_latent_table_trains_every_kind_of_row(arguments, tmp_path, capsys, monkeypatch):
    layers = (0, 1, -1)  # of a small encoder
    monkeypatch.setattr(latent_table, "LAYERS", layers)
    monkeypatch.setitem(latent_table.BASE, "encoder_params.layers", layers)
    monkeypatch.setitem(latent_table.ROWS["feature decoder"], "decoder_features", layers)
    arguments = [argument for argument in arguments if not argument.startswith("--size")]
    names = ["routed fusion", "feature decoder", "128 tokens, nested", "vq, DiVeQ", "simvq, bridge"]
    latent_table.main([*arguments, "--patch=14", "--steps=2", "--seeds=1", "--batch=4", f"--rows={';'.join(names)}"])
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["row"] for row in rows] == names
    assert all(0 < row["psnr"] < 30 and 0 < row["use"] <= 1 for row in rows)
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in names)
    with pytest.raises(ConfigError) as error:
        latent_table.main([*arguments, "--rows=egdes"])
    assert (error.value.field, error.value.value) == ("--rows", "egdes")


def test_tokenize_folder_times_every_way(trained, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for i in range(17):
        images.write_image(tmp_path / f"{i:02d}.png", rng.integers(0, 256, (34 + i, 40, 3), np.uint8))
    tokenize_folder.main([f"--checkpoint={trained}", f"--data={tmp_path}", "--batch=8", "--rounds=1"])
    printed = capsys.readouterr().out
    assert "16 images in batches of 8, 32 pixels" in printed
    ways = dict(re.findall(r"^\| ([a-z ]+) \| [\d.]+ \| ([\d.]+) \|$", printed, re.M))
    assert list(ways) == [getattr(tokenize_folder, name) for name in ("PROGRAM", "READ", "MEMORY", "DISK")]
    assert float(ways[tokenize_folder.PROGRAM]) == 1


def test_the_time_to_a_quality_is_that_of_the_first_point_that_reaches_all_targets():
    values = [(1.0, 20.0, 0.5), (2.0, 22.0, 0.3), (3.0, 21.0, 0.2)]
    points = [{"seconds": s, "psnr": psnr, "encoder_cosine": distance} for s, psnr, distance in values]
    curve = time_to_quality.Curve("recipe", 0, 16, points)
    assert curve.seconds_to({"psnr": 21.0}) == 2
    assert curve.seconds_to({"psnr": 21.0, "encoder_cosine": 0.25}) == 3
    assert curve.seconds_to({"psnr": 23.0}) is None


def test_time_to_quality_refuses_unknown_variants(arguments):
    arguments = [argument for argument in arguments if not argument.startswith("--size")]
    with pytest.raises(ConfigError) as error:
        time_to_quality.main([*arguments, "--variants=edges;egdes"])
    assert (error.value.field, error.value.value) == ("--variants", "egdes")


@pytest.mark.slow
def test_time_to_quality_draws_curves_of_both_frameworks(arguments, tmp_path, capsys):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    arguments = [argument for argument in arguments if not argument.startswith("--size")]
    variants = [time_to_quality.BASELINE, "edges"]
    short = ["--patch=14", "--steps=2", "--points=2", "--seeds=1", "--batch=4", f"--variants={';'.join(variants)}"]
    time_to_quality.main([*arguments, *short])
    curves = json.loads((tmp_path / "curves.json").read_text())["curves"]
    assert [curve["name"] for curve in curves] == variants
    for curve in curves:
        first, last = curve["points"]
        assert (first["step"], last["step"]) == (1, 2)
        assert 0 < first["seconds"] < last["seconds"]
    assert (tmp_path / "curves.png").stat().st_size > 0
    assert f"| {time_to_quality.BASELINE} |" in capsys.readouterr().out


@pytest.mark.slow
def test_generator_speed_at_a_tiny_size(capsys):
    pytest.importorskip("transformers")
    arguments = "--width=16 --depth=1 --heads=2 --grid=2 --codes=8 --images=2 --batch=3 --rounds=1"
    generator_speed.main(shlex.split(arguments))
    out = capsys.readouterr().out
    assert len(re.findall(r": [\d.]+ x$", out, re.M)) == 3
    assert "equal codes: 100.00%" in out
