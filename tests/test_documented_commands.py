"""Every command of the README and the pages in docs/ is run, in small, at a desk where what it names lies.

The hub ids of encoders are folders with tiny encoders, /data is a folder of a few pictures, and what is of full size is
made small (`in_small`). A command that reads what another documented command writes comes after it.
"""

import importlib
import pathlib
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
from absl import flags

from vqrae_jax import distributed
from vqrae_jax.data import images

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = list(dict.fromkeys(
    part.strip()
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    for line in block.strip().splitlines()
    for part in line.split("&&")
))  # fmt: skip
QUICKSTART = "python -m vqrae_jax.main --config=configs/quickstart.py --workdir=runs/quickstart"
NOT_RUN = {  # what a command begins with -> why it is not run here
    "pip install": "needs a package registry; .ci/run starts with it",
    "uv pip install": "needs a package registry",
    "python -m pytest": "is what runs this",
    QUICKSTART: "tests/test_main.py runs it in a process of its own",
    "python -m vqrae_jax.commands.demo": "serves until it is stopped; tests/commands/test_demo.py clicks on the page",
}
PLACES = {r"(^|=)/(data|path/to/imagenet)/": r"\1data/", "ep-last.pt": "ep-last.npz"}  # of what lies at the desk
POD = "needs a pod, a cluster or its clients; tests/launch/test_launch.py runs the page's commands dry"
STARTS = ("export ", "launch/", "docker ", "kubectl ", "CONFIG=", "TOPOLOGY=", "PROCESSES=")
NOT_RUN |= dict.fromkeys(STARTS, POD)
TRAINING = {
    "train.epochs": 1, "train.evaluate_every": 1, "train.checkpoint_every": 1, "train.log_every": 1,
    "data.batch_size": 8, "data.eval_batch_size": 8, "data.image_size": 32, "optimizer.warmup_steps": 1,
    "optimizer.accumulate": 1, "model.encoder_input_size": 56, "model.num_embeddings": 32,
    "model.decoder_patch_size": 8,
    "loss.perceptual.weight": 0.0, "adversary.discriminator": "none",  # their networks are on a hub, in one size
}  # fmt: skip
DEAR = ("vqrae_jax.main", "benchmarks.quantizer_table")


def module_and_arguments(command):
    program, *arguments = shlex.split(command.removeprefix("python ").removeprefix("-m "))
    return program.removesuffix(".py").replace("/", "."), arguments


def outputs(command):
    """What it writes, as it names it; evaluating and asking in advance write nothing that others read."""
    trains = "vqrae_jax.main" in command and "--mode=" not in command
    return re.findall(r"--workdir=(\S+)" if trains else r"--output=(\S+)", command)


def inputs(command):
    """What it names and does not write."""
    values = {part.partition("=")[2] or part for part in shlex.split(command)}
    return values - set(outputs(command))


def reason(command):
    """Why it is not run; empty for one that is."""
    return next((why for start, why in NOT_RUN.items() if command.startswith(start)), "")


def before(command):
    """The commands whose results it reads."""
    return [other for other in COMMANDS if set(outputs(other)) & inputs(command) and not reason(other)]


def in_small(module, arguments, golden):
    """Arguments that make of a full-size command one of a few seconds, in place of those that would not."""
    if module.endswith("import_origin"):
        return [re.sub(r"^(--config)=.*", r"\1=configs/case.py", a) for a in arguments]
    if module == "benchmarks.quantizer_table":
        return [*arguments, "--size=56", "--steps=1", "--quantizers=none"]
    if module != "vqrae_jax.main" or "--config=configs/quickstart.py" in arguments:
        return arguments
    known = {"--topology=v5e:16x16": "--topology=cpu:4", "--topology=v5e:4x4": "--topology=cpu:2"}  # libtpu is an extra
    known["--config.data.name=imagenet2012"] = "--config.data.name=waves_array_record"
    arguments = [known.get(a, a) for a in arguments]
    figures = re.compile(r"--config\.evaluation\.(figures|inception_path)=.*")  # weights that no package ships
    arguments = [a for a in arguments if not figures.match(a) and not a.startswith("--config.optimizer.accumulate")]
    decoder = f"--config.model.decoder_config_path={golden / 'vqrae' / 'decoder_config'}"
    small = [f"--config.{name}={value}" for name, value in TRAINING.items()]
    return [*arguments, decoder, *small, *(["--alternatives=0"] if "--mode=preflight" in arguments else [])]


@pytest.fixture(scope="module")
def desk(golden, tiny, trained, tmp_path_factory):
    """A folder in which everything lies that the documentation takes for granted."""
    desk = tmp_path_factory.mktemp("desk")
    rng = np.random.default_rng(0)
    for folder, count in {"data/train": 16, "data/val": 8, "photographs/train": 32, "photographs/val": 4}.items():
        for i in range(count):
            images.write_image(desk / folder / f"{i:02d}.png", rng.integers(0, 256, (60, 60, 3), np.uint8))
    images.write_image(desk / "cat.png", rng.integers(0, 256, (80, 60, 3), np.uint8))
    shutil.copytree(ROOT / "configs", desk / "configs")
    (desk / "configs" / "quickstart.py").write_text(
        f"import ml_collections\n\n\ndef get_config():\n    return ml_collections.ConfigDict({tiny().model_dump()!r})\n"
    )
    for name in ("runs/quickstart", "runs/other"):
        shutil.copytree(trained, desk / name)
    encoders = {
        "facebook/dinov2-base": "dinov2", "facebook/dinov2-with-registers-base": "dinov2_with_registers",
        "facebook/dinov2-with-registers-large": "dinov2_with_registers", "vit-tiny": "dinov2",
    }  # fmt: skip
    for name, tiny in encoders.items():
        (desk / name).parent.mkdir(exist_ok=True)
        (desk / name).symlink_to(golden / "encoders" / tiny)
    (desk / "data" / "tensorflow_datasets").symlink_to(ROOT / "tests" / "data" / "fixtures")
    case = {
        "encoder_config_path": str(golden / "encoders" / "dinov2_with_registers"), "encoder_input_size": 56,
        "decoder_config_path": str(golden / "vqrae" / "decoder_config"), "num_embeddings": 64,
        "normalization_stat_path": str(golden / "vqrae" / "ema_vq_2d" / "stat.npz"),
    }  # fmt: skip
    lines = [f"    c.model.{name} = {value!r}\n" for name, value in case.items()]
    start = "from vqrae_jax import config\n\n\ndef get_config():\n    c = config.defaults()\n"
    (desk / "configs" / "case.py").write_text(f"{start}{''.join(lines)}    return c\n")
    shutil.copy(golden / "vqrae" / "ema_vq_2d" / "model.npz", desk / "ep-last.npz")
    return desk


@pytest.fixture(scope="module")
def done():
    """Commands that were run at the desk."""
    return set()


def run(command, done, golden, monkeypatch):
    """Does what `python -m` would, in this process, after the commands whose results it reads."""
    monkeypatch.setattr(distributed, "start", lambda *_: None)  # comes before all computations in a process of its own
    if command in done:
        return
    done.add(command)
    for other in before(command):
        run(other, done, golden, monkeypatch)
    module, arguments = module_and_arguments(command)
    for name, place in PLACES.items():
        arguments = [re.sub(name, place, argument) for argument in arguments]
    arguments = in_small(module, arguments, golden)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    try:
        if module == "vqrae_jax.main":
            run_main(arguments)
        elif module.startswith("benchmarks."):
            importlib.import_module(module).main(arguments)
        else:
            importlib.import_module(module).main()
    except SystemExit as left:
        if left.code:
            raise AssertionError(f"{command}: {left.code}") from left


def run_main(arguments):
    """main.py with flags of its own, as often as wanted."""
    from vqrae_jax import main

    try:
        main.main(main._parse(["main", *arguments]))
    finally:
        flags.FLAGS.unparse_flags()
        for name in list(flags.FLAGS):
            if name.startswith("config."):
                delattr(flags.FLAGS, name)
            elif flags.FLAGS[name].present:
                flags.FLAGS[name].unparse()


def dear(command):
    """Trains or compares at some length, or comes after what does."""
    own = module_and_arguments(command)[0] in DEAR and "--config=configs/quickstart.py" not in command
    return own or any(map(dear, before(command)))


def marked(command):
    return pytest.param(command, marks=[pytest.mark.slow] if dear(command) else [])


@pytest.mark.parametrize("command", [marked(command) for command in COMMANDS if not reason(command)])
def test_it_runs(command, desk, done, golden, monkeypatch, capsys):
    if "--format=pytorch" in command:
        pytest.importorskip("torch", reason="PyTorch files need PyTorch")
    monkeypatch.chdir(desk)
    run(command, done, golden, monkeypatch)
    assert all((desk / name.removeprefix("/")).exists() for name in outputs(command))
    if "--help" in command:
        assert capsys.readouterr().out.startswith("usage: ")


def test_what_is_not_run_is_still_there():
    """No reason without a command, and no command that only looks like one of them."""
    for start in NOT_RUN:
        assert any(command.startswith(start) for command in COMMANDS), start
    assert all(
        command.startswith(("python -m vqrae_jax", "python benchmarks/")) for command in COMMANDS if not reason(command)
    )
