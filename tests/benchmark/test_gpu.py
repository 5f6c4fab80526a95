import json
import shlex

import pytest

from vqrae_jax.benchmark import __main__ as benchmark
from vqrae_jax.benchmark import end_to_end, gpu, kernels, speed

FIGURES = [(part, figure) for part, figures in gpu.PARTS.items() for figure in figures]


@pytest.mark.parametrize(("part", "figure"), FIGURES, ids=[figure.name for _, figure in FIGURES])
def test_every_figure_is_a_command_that_exists(part, figure, tmp_path):
    (found,) = gpu.commands(gpu.parse([part, f"--only={figure.name}", f"--output={tmp_path}"]))
    _, _, module, name, *rest = found[1]
    if module == "vqrae_jax.main":
        assert name.startswith("--config=configs/cpu_recipe.py")
        return
    assert name in benchmark.BENCHMARKS
    {"kernels": kernels.parse, "end_to_end": end_to_end.parse}.get(name, lambda a: speed.parse([name, *a]))(rest)


def test_names_are_folders_of_the_report():
    names = [figure.name for _, figure in FIGURES]
    assert len(set(names)) == len(names)


def test_a_report_has_what_ran_and_why_others_did_not(tmp_path, capsys):
    smaller = "--encoder=tiny --batch=2 --rounds=1 --codes=32"
    arguments = [f"--output={tmp_path}", f"--smaller={smaller}"]
    benchmark.main(["gpu", "speed", "--only=tokenize-cudnn", *arguments])
    (found,) = json.loads((tmp_path / "speed.json").read_text())
    assert not found["failed"]
    assert found["report"]["rows"][0]["images_per_second"] > 0
    assert "| tokenize-cudnn | as tokenize |" in capsys.readouterr().out
    benchmark.main(["gpu", "recipe", "--only=kernels,loop", *arguments, "--limit=0"])
    found = json.loads((tmp_path / "recipe.json").read_text())
    assert [figure["failed"] for figure in found] == ["no time was left"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("part", ["speed", "recipe"])
def test_every_figure_runs(part, tmp_path):
    """At tiny sizes, on this machine."""
    for figure in gpu.PARTS[part]:
        smaller = "--encoder=tiny --decoder=ViT-Nano --batch=2 --rounds=1 --codes=32"
        name = shlex.split(figure.arguments)[0]
        smaller = {
            "kernels": "--latents=64 --codes=64 --channels=32 --images=1 --heads=1 --tokens 17 --rounds=1",
            "end_to_end": "--steps=40 --batch=8 --size=32",
        }.get(name, smaller)
        arguments = [f"--only={figure.name}", f"--output={tmp_path}", f"--smaller={smaller}", "--limit=300"]
        benchmark.main(["gpu", part, *arguments])
        (found,) = json.loads((tmp_path / f"{part}.json").read_text())
        assert bool(found["failed"]) == (figure.name == "tokenize-cores"), found  # a CPU has none
