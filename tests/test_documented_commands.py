"""Runs every command of the README, of the pages in docs/ and of docstrings at a small scale, in one prepared folder.

Those of the README that train nothing run in the process of the tests; with `-m slow` all do, and in a process of
their own each.

Hub ids of encoders are folders with tiny encoders, /data is a folder of a few images, and `shrink` replaces full-size
settings. A command that reads the output of another documented command runs after it.
"""

import importlib
import json
import logging
import pathlib
import re
import runpy
import shlex
import shutil
import sys

import numpy as np
import pytest

from vqrae_jax import distributed
from vqrae_jax.data import images

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = [  # files that run as programs and read arguments
    *sorted(path for path in (ROOT / "vqrae_jax" / "commands").glob("*.py") if "\nmain = " in path.read_text()),
    ROOT / "vqrae_jax" / "benchmark" / "__main__.py", *sorted((ROOT / "benchmarks").glob("*.py")),
    *sorted((ROOT / "examples").glob("*.py")),
]  # fmt: skip
BLOCKS = [
    block
    for page in PAGES if page.name != "api.md"
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
] + [  # of docstrings: "vqrae NAME" is python -m vqrae_jax.commands.NAME
    re.sub(r"vqrae ([a-z-]+)", lambda m: f"python -m vqrae_jax.commands.{m[1].replace('-', '_')}", command)
    for path in (*PROGRAMS, ROOT / "vqrae_jax" / "main.py", ROOT / "docs" / "write_api.py")
    for command in re.findall(r"^(?:vqrae|python) .*$", path.read_text(encoding="utf-8").split('"""')[1], re.M)
]  # fmt: skip
COMMANDS = list(dict.fromkeys(
    part.strip() for block in BLOCKS for line in block.strip().splitlines() for part in line.split("&&")
))  # fmt: skip
QUICKSTART = "python -m vqrae_jax.main --config=configs/quickstart.py --workdir=runs/quickstart"
BENCHMARKS = (
    "codebook_law",
    "end_to_end",
    "generator_speed",
    "latent_table",
    "gpu",
    "quantizer_speed",
    "sampler_error",
    "time_to_quality",
    "tokenize_folder",
    "torch_input",
    "training_input",
)
POD = "needs a pod, a cluster or its clients; tests/launch/test_launch.py runs these commands dry"
NOT_RUN = {  # beginning of a command -> why it is not run here
    "pip install": "needs a package registry; .ci/run starts with it",
    "uv pip install": "needs a package registry",
    "hf download": "needs the model hub",
    "gcloud ": POD,
    **dict.fromkeys(("python -m venv", "source "), "prepares an installation"),
    "ruff": "checks the style; not a requirement of the tests",
    "python -m pytest": "would run itself",
    QUICKSTART: "tests/test_main.py runs it in a process of its own",
    "python -m vqrae_jax.commands.demo": "serves until it is stopped; tests/commands/test_demo.py uses the page",
    "python -m vqrae_jax.commands.reference_statistics --data": "needs the weights of Inception",
    "python docs/write_api.py": "writes docs/api.md; tests/test_readme.py builds it",
    "python examples/": "tests/examples/test_examples.py runs them",
    **dict.fromkeys(
        (f"python benchmarks/{name}.py" for name in BENCHMARKS), "minutes; tests/benchmark/test_drivers.py"
    ),
    "python -m vqrae_jax.benchmark": "minutes: tests/benchmark",
    **dict.fromkeys(("export ", "launch/", "docker ", "kubectl ", "CONFIG=", "TOPOLOGY=", "PROCESSES="), POD),
}
LOCAL = {r"(^|=)/(data|path/to/imagenet)/": r"\1data/", "ep-last.pt": "ep-last.npz", "--codes=16384": "--codes=256"}
SMALL = {
    "train.epochs": 1, "train.evaluate_every": 1, "train.checkpoint_every": 1, "train.log_every": 1,
    "data.batch_size": 8, "data.eval_batch_size": 8, "data.image_size": 32, "optimizer.warmup_steps": 1,
    "optimizer.accumulate": 1, "model.encoder_input_size": 56, "model.num_embeddings": 32,
    "model.decoder_patch_size": 8,
    "loss.perceptual.weight": 0.0, "adversary.discriminator": "none",  # their networks are on a hub, in one size
}  # fmt: skip
REPLACED = {  # TPU topologies need libtpu, an extra
    "--topology=v5e:8x8": "--topology=cpu:4",
    "--config.data.name=imagenet2012": "--config.data.name=waves_array_record",
}


def split(command):
    program, *arguments = shlex.split(command.removeprefix("python ").removeprefix("-m "))
    return program.removesuffix(".py").replace("/", "."), arguments


def outputs(command):
    """Returns the paths that a command writes; evaluation and preflight write nothing that other commands read."""
    trains = "vqrae_jax.main" in command and "--mode=" not in command
    return re.findall(r"--workdir=(\S+)" if trains else r"--output=(\S+)", command)


def inputs(command):
    return {part.partition("=")[2] or part for part in shlex.split(command)} - set(outputs(command))


def reason_not_run(command):
    return next((reason for start, reason in NOT_RUN.items() if command.startswith(start)), "")


def prerequisites(command):
    return [c for c in COMMANDS if set(outputs(c)) & inputs(command) and not reason_not_run(c)]


def is_heavy(command):
    """Returns whether a command, or one that it needs, trains a model or runs a benchmark."""
    heavy = split(command)[0] in ("vqrae_jax.main", "benchmarks.quantizer_table")
    small = "--config=configs/quickstart.py" in command and "--mode=" in command
    return (heavy and not small) or any(map(is_heavy, prerequisites(command)))


README = PAGES[0].read_text(encoding="utf-8")
LIGHT = {c for c in COMMANDS if c in README and not reason_not_run(c) and not is_heavy(c)}  # all others are slow


def shrink(module, arguments, golden):
    """Returns arguments with which a full-size command takes a few seconds."""
    for pattern, replacement in LOCAL.items():
        arguments = [re.sub(pattern, replacement, argument) for argument in arguments]
    if module.endswith("latent_statistics"):
        return [*arguments, f"--size={SMALL['model.encoder_input_size']}"]
    if module == "benchmarks.quantizer_table":
        return [*arguments, "--size=56", "--steps=1", "--quantizers=none"]
    if module != "vqrae_jax.main" or "--config=configs/quickstart.py" in arguments:
        return arguments
    left_out = re.compile(r"--config\.(evaluation\.(metrics|inception_path)|optimizer\.accumulate)=")  # needs weights
    arguments = [REPLACED.get(argument, argument) for argument in arguments if not left_out.match(argument)]
    small = SMALL | {"model.decoder_config_path": golden / "vqrae" / "decoder_config"}
    for config, size in {"laptop": 32, "emoji_cpu": 16}.items():  # four patches per side
        small |= {"model.encoder_input_size": size} if f"--config=configs/{config}.py" in arguments else {}
    if "--config=configs/generator_cpu.py" in arguments:
        small |= {"generator.width": 32, "generator.heads": 2, "generator.mlp": 64, "generator.depth": 1}
    if "--checkpoint=imported" in arguments:  # whose model is small
        small = {n: value for n, value in small.items() if not n.startswith("model.")} | {"data.image_size": 64}
    arguments += [f"--config.{name}={value}" for name, value in small.items()]
    return [*arguments, "--alternatives=0"] if "--mode=preflight" in arguments else arguments


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["inside", "outside"])
def outside(request):
    """Whether each command has a process of its own."""
    return request.param


@pytest.fixture(scope="module")
def workspace(outside, golden, tiny, trained, trained_generator, tmp_path_factory):
    """A folder with everything that the documentation assumes."""
    folder = tmp_path_factory.mktemp("workspace")
    rng = np.random.default_rng(0)
    folders = {"data/train": 16, "data/val": 8, "photographs/train": 32, "photographs/val": 4}
    folders |= {f"emoji/{part}/{name}": 8 for part in ("train", "val") for name in ("flags", "smileys_emotion")}
    for name, count in folders.items():
        for i in range(count):
            images.write_image(folder / name / f"{i:02d}.png", rng.integers(0, 256, (60, 60, 3), np.uint8))
    images.write_image(folder / "cat.png", rng.integers(0, 256, (80, 60, 3), np.uint8))
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "configs" / "quickstart.py").write_text(
        "from ml_collections import config_dict\n\n\ndef get_config():\n"
        f"    c = config_dict.ConfigDict({tiny().model_dump()!r})\n"
        "    c.data.path = config_dict.placeholder(str)\n    return c\n"
    )
    case = golden / "vqrae" / "ema_vq_2d"
    released = {"pretrained_decoder_path": str(case / "model.npz"), "normalization_stat_path": str(case / "stat.npz")}
    released |= {"encoder_config_path": "facebook/dinov2-with-registers-base", "encoder_input_size": 56}
    rae = tiny(model={**released, "encoder_params": {}, "decoder_patch_size": 16, "quantizer": "none"})
    (folder / "configs" / "rae_dinov2_b.py").write_text(
        "from ml_collections import config_dict\n\n\ndef get_config():\n"
        f"    return config_dict.ConfigDict({rae.model_dump()!r})\n"
    )
    runs = {"runs/quickstart": trained, "runs/other": trained, "runs/generator": trained_generator}
    for name, workdir in runs.items():
        shutil.copytree(workdir, folder / name)
    encoders = {
        "facebook/dinov2-base": "dinov2", "facebook/dinov2-with-registers-base": "dinov2_with_registers",
        "facebook/dinov2-with-registers-large": "dinov2_with_registers", "vit-tiny": "dinov2",
    }  # fmt: skip
    for name, encoder in encoders.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(golden / "encoders" / encoder)
    (folder / "data" / "tensorflow_datasets").symlink_to(ROOT / "tests" / "data" / "fixtures")
    params = json.loads((case / "params.json").read_text())["params"]
    params |= {name: str(golden / params[name]) for name in ("encoder_config_path", "decoder_config_path")}
    params |= {"encoder_params": {}, "normalization_stat_path": str(case / "stat.npz")}
    content = {"stage_1": {"target": "stage1.VQRAE", "params": params}, "training": {"epochs": 1}}
    (folder / "VQRAE-DINOv2-B.yaml").write_text(json.dumps(content))
    shutil.copy(case / "model.npz", folder / "ep-last.npz")
    return folder


@pytest.fixture(scope="module")
def completed(outside):
    """Commands that have run in the workspace."""
    return set()


@pytest.fixture
def run_command(outside, workspace, completed, golden, parsed_flags, run_elsewhere, monkeypatch):
    """Runs a command as `python -m` does, after the commands whose results it reads."""
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(distributed, "connect", lambda *_, **__: None)  # must precede all computations of a process

    def run(command):
        if command in completed:
            return
        completed.add(command)
        for prerequisite in prerequisites(command):
            run(prerequisite)
        module, arguments = split(command)
        arguments = shrink(module, arguments, golden)
        if outside:
            benchmark = module.startswith("benchmarks.")
            start = [ROOT / f"{module.replace('.', '/')}.py"] if benchmark else ["-m", module]
            print(run_elsewhere(*start, *arguments, folder=workspace), end="")
            return
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        try:
            if module == "vqrae_jax.main":
                run_main(arguments, parsed_flags)
            elif module.startswith("benchmarks."):
                importlib.import_module(module).main(arguments)
            else:
                importlib.import_module(module).main()
        except SystemExit as error:
            if error.code:
                raise AssertionError(f"{command}: {error.code}") from error

    return run


def run_main(arguments, parsed_flags):
    """Runs main.py and restores what it changes in the process: flags and log levels."""
    from vqrae_jax import main

    logger = logging.getLogger("vqrae_jax")
    level = logger.level
    try:
        with parsed_flags(arguments) as rest:
            main.main(rest)
    finally:
        logger.setLevel(level)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=[pytest.mark.slow] if command not in LIGHT else [])
        for command in COMMANDS
        if not reason_not_run(command)
    ],
)
def test_command_runs(command, run_command, workspace, capsys):
    if "--format=pytorch" in command:
        pytest.importorskip("torch", reason="PyTorch files need PyTorch")
    run_command(command)
    assert all((workspace / name.removeprefix("/")).exists() for name in outputs(command))
    if "--help" in command:
        assert capsys.readouterr().out.startswith("usage: ")


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_wrong_arguments_end_with_one_line(path, monkeypatch, capsys):
    if path.stem in ("codes_torch", "codes_datasets"):
        pytest.importorskip(path.stem.removeprefix("codes_"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(distributed, "connect", lambda *_, **__: None)
    for arguments, code, start in ((["--nonsense=1"], 2, "usage: "), (["--help"], 0, "")):
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(path), run_name="__main__")
        output = capsys.readouterr()
        assert ended.value.code == code
        assert output.err.startswith(start)
        assert ("error: " in output.err.splitlines()[-1]) if code else output.out.startswith("usage: ")


def test_commands_in_prose_exist():
    """`vqrae NAME --FLAG` in documents, docstrings and messages."""
    pattern = re.compile(r"`(?:python -m vqrae_jax\.commands\.|vqrae )(\w[\w-]*)((?: --[a-z-]+)*)")
    for path in (*PAGES, *(ROOT / "vqrae_jax").rglob("*.py")):
        for name, options in pattern.findall(path.read_text(encoding="utf-8")):
            if name not in ("NAME", "COMMAND"):
                module = importlib.import_module(f"vqrae_jax.commands.{name.replace('-', '_')}")
                assert set(options.split()) <= set(module.parser._option_string_actions), (path, name, options)


def test_reasons_have_commands():
    """Every reason excludes a command, and all other commands are of this package."""
    for start in NOT_RUN:
        assert any(command.startswith(start) for command in COMMANDS), start
    assert all(
        command.startswith(("python -m vqrae_jax", "python benchmarks/"))
        for command in COMMANDS
        if not reason_not_run(command)
    )
