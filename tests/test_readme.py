"""Checks the statements of the README and of the pages in docs/ that can be run or looked up."""

import importlib
import importlib.util
import pathlib
import re
import runpy
import shlex
import tomllib

import numpy as np
import pytest

from vqrae_jax import config

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path: path.read_text(encoding="utf-8") for path in DOCUMENTS if path.name != "api.md"}
README = PAGES[ROOT / "README.md"]
COMMANDS = [
    part.strip()
    for page in PAGES.values()
    for block in re.findall(r"```bash\n(.*?)```", page, re.S)
    for line in block.strip().splitlines()
    for part in line.split("&&")
]
REPEATED = ("from_pytorch.md-0", "quantizers.md-2", "tokenize.md-1")  # other tests build the same models
PYTHON = [
    pytest.param(block, id=f"{path.name}-{i}", marks=[pytest.mark.slow] * (f"{path.name}-{i}" in REPEATED))
    for path, page in PAGES.items()
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", page, re.S))
]


def test_readme_is_short():
    assert len(README.splitlines()) <= 130
    prose = re.sub(r"```.*?```", "", README, flags=re.S)
    assert sum(len(line.split()) for line in prose.splitlines() if not line.startswith("|")) <= 900


def test_readme_has_the_two_commands():
    assert "python -m pytest" in COMMANDS
    assert "python -m vqrae_jax.main --config=configs/quickstart.py --workdir=runs/quickstart" in COMMANDS
    assert "python -m pytest" in (ROOT / ".ci" / "run").read_text()


def test_readme_names_every_config_and_quantizer():
    configs = {path.name for path in (ROOT / "configs").glob("*.py")} - {"base.py"}
    quantizers = set(config.ModelConfig.model_fields["quantizer"].annotation.__args__)
    assert {name for name in configs | quantizers if f"`{name}`" not in README} == set()


@pytest.mark.parametrize("command", sorted({c for c in COMMANDS if c.startswith("python -m vqrae_jax")}))
def test_commands_name_existing_arguments(command):
    module, *arguments = shlex.split(command)[2:]
    module = "vqrae_jax.benchmark.speed" if module == "vqrae_jax.benchmark" else module
    source = pathlib.Path(importlib.util.find_spec(module).origin)
    if source.name == "__init__.py":
        source = source.with_name("__main__.py")
    parser = getattr(importlib.import_module(module), "parser", None)
    parsed = parser and "--help" not in arguments and parser.parse_args(arguments)
    for argument in arguments:
        name, _, value = argument.removeprefix("--").partition("=")
        if name.startswith("config."):
            config.check_field(config.Config, name.removeprefix("config."))
        elif name == "config" and value.startswith("configs/"):  # others are written by commands, or of the reader
            assert (ROOT / value.split(":")[0]).is_file()
        elif argument.startswith("--") and not parsed:
            assert name == "help" or f'"{name}"' in source.read_text() or f'"--{name}"' in source.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_fields_exist(page):
    sections = "|".join(config.Config.model_fields)
    for name in re.findall(rf"`((?:{sections})(?:\.\w+)+)(?:=[^`]*)?`", PAGES[page]):
        if not name.endswith(".py"):
            config.check_field(config.Config, name)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_files_and_links_exist(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGES[page]):
        assert (page.parent / target).exists(), target
    for name in set(re.findall(r"`(?:configs/)?(\w+\.py)`", PAGES[page])) - {"NAME.py"}:
        assert any(
            list(ROOT.glob(f"{folder}/**/{name}")) for folder in ("configs", "vqrae_jax", "benchmarks", "examples")
        ), name


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\(docs/([^)]+)\)", README))
    assert {page.name for page in PAGES if page.parent == ROOT / "docs"} <= linked


def test_api_document_names_every_public_function():
    script = runpy.run_path(str(ROOT / "docs" / "write_api.py"))
    text = script["build_document"]()
    assert script["public_names"]() >= {"Tokenizer", "VQRAE", "Codes", "build_tokenizer", "ModelConfig"}
    assert {name for name in script["public_names"]() if f"\n### {name}\n" not in text} == set()


def test_reference_pages_are_current():
    """`python docs/write_reference.py` updates them; it fails if a field has no documentation."""
    script = runpy.run_path(str(ROOT / "docs" / "write_reference.py"))
    for path, text in script["write_pages"]().items():
        assert path.read_text(encoding="utf-8") == text, path.name


@pytest.mark.parametrize("block", PYTHON)
def test_python_blocks_run(block, golden, trained, tmp_path, monkeypatch, request):
    """Runs them on a short run in place of the quickstart's and on a small encoder in place of the hub's."""
    small = {
        "runs/quickstart": str(trained),
        "facebook/dinov2-base": str(golden / "encoders" / "dinov2"),
        '"ViT-B"': '"ViT-Nano", encoder_input_size=56',
        "8192": "64",
    }
    if "runs/generator" in block:
        small["runs/generator"] = str(request.getfixturevalue("trained_generator"))
    for name, replacement in small.items():
        block = block.replace(name, replacement)
    monkeypatch.chdir(tmp_path)
    names = {"images": np.random.default_rng(0).uniform(size=(2, 64, 64, 3)).astype(np.float32)}
    exec(compile(block, "documentation", "exec"), names)
    if "reconstructions" in names:
        assert names["reconstructions"].shape[0] == 2
        assert np.isfinite(names["reconstructions"]).all()


def test_readme_names_every_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {name for name in project["optional-dependencies"] if f"`{name}`" not in README} == set()
