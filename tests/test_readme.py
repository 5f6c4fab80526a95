"""Every statement of the README and the pages in docs/ that can be run or looked up."""

import importlib
import importlib.util
import pathlib
import re
import runpy
import shlex

import numpy as np
import pytest

from vqrae_jax import config

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
COMMANDS = [
    part.strip()
    for page in PAGES.values()
    for block in re.findall(r"```bash\n(.*?)```", page, re.S)
    for line in block.strip().splitlines()
    for part in line.split("&&")
]


def test_the_two_commands_are_there():
    assert "python -m pytest" in COMMANDS
    assert "python -m vqrae_jax.main --config=configs/quickstart.py --workdir=runs/quickstart" in COMMANDS
    assert "python -m pytest" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("command", sorted({c for c in COMMANDS if c.startswith("python -m vqrae_jax")}))
def test_commands_name_what_exists(command):
    module, *arguments = shlex.split(command)[2:]
    module = "vqrae_jax.benchmark.speed" if module == "vqrae_jax.benchmark" else module
    source = pathlib.Path(importlib.util.find_spec(module).origin)
    if source.name == "__init__.py":
        source = source.with_name("__main__.py")
    parser = getattr(importlib.import_module(module), "parse", None)
    parsed = parser and "--help" not in arguments and parser(arguments)
    for argument in arguments:
        name, _, value = argument.removeprefix("--").partition("=")
        if name.startswith("config."):
            config.check_field(config.Config, name.removeprefix("config."))
        elif name == "config" and value:
            assert (ROOT / value.split(":")[0]).is_file()
        elif argument.startswith("--") and not parsed:
            assert name == "help" or f'"{name}"' in source.read_text() or f'"--{name}"' in source.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_fields_exist(page):
    sections = "|".join(config.Config.model_fields)
    for name in re.findall(rf"`((?:{sections})(?:\.\w+)+)(?:=[^`]*)?`", PAGES[page]):
        config.check_field(config.Config, name)


def test_the_api_page_is_what_the_docstrings_say():
    written = runpy.run_path(str(ROOT / "docs" / "write_api.py"))["document"]()
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == written, "run python docs/write_api.py"


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(size=(2, 64, 64, 3)).astype(np.float32)


def test_python_blocks_run(golden, trained, images):
    """The first on a small run instead of the quickstart's, the second on a small encoder instead of the hub's."""
    small = {
        "runs/quickstart": str(trained),
        "facebook/dinov2-base": str(golden / "encoders" / "dinov2"),
        '"ViT-B"': '"ViT-Nano", encoder_input_size=56',
        "8192": "64",
    }
    use, build = re.findall(r"```python\n(.*?)```", README, re.S)
    for block in (use, build):
        for name, replacement in small.items():
            block = block.replace(name, replacement)
        names = {"images": images}
        exec(compile(block, "README.md", "exec"), names)
        assert names["pictures"].shape[0] == 2
        assert np.isfinite(names["pictures"]).all()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_files_and_links_exist(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGES[page]):
        assert (page.parent / target).exists(), target
    for name in re.findall(r"`(?:configs/)?(\w+\.py)`", PAGES[page]):
        assert list(ROOT.glob(f"configs/{name}")) or list(ROOT.rglob(f"vqrae_jax/**/{name}")), name


def test_extras_exist():
    given = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M))
    assert {"cuda13", "tpu", "torch", "wandb", "demo", "notebook", "browser"} <= given
