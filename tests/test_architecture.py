"""The plan of the house: who may import whom, and by which one door an outside library comes in."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "vqrae_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 420

MAY_IMPORT = {
    "__init__": {"models", "inference"},  # the public names, on first use
    "errors": set(),
    "resize": set(),
    "losses": set(),
    "generation": set(),
    "runtime": set(),
    "storage": {"runtime", "errors"},
    "progress": set(),
    "config": {"quantizers", "errors"},
    "distributed": {"runtime", "errors"},
    "sharding": {"quantizers", "errors"},
    "data": {"storage", "runtime", "errors"},
    "checkpoint": {"", "distributed", "runtime", "storage", "errors"},
    "quantizers": {"resize", "errors"},
    "models": {"quantizers", "resize"},
    "pretrained": {"resize", "storage", "errors"},
    "build": {"models", "quantizers", "pretrained", "config", "sharding", "errors"},
    "evaluation": {
        "", "build", "models", "pretrained", "config", "data", "sharding", "distributed", "storage", "quantizers",
        "errors",
    },
    "inference": {
        "", "build", "models", "quantizers", "pretrained", "data", "evaluation", "sharding", "checkpoint", "config",
        "resize", "storage", "errors",
    },
    "commands": {
        "", "build", "models", "quantizers", "pretrained", "generation", "data", "evaluation", "inference", "sharding",
        "checkpoint", "config", "distributed", "storage", "runtime", "progress", "errors",
    },
    "train": {
        "", "build", "models", "quantizers", "losses", "pretrained", "generation", "data", "evaluation", "sharding",
        "checkpoint", "config", "distributed", "storage", "runtime", "progress", "errors",
    },
    "preflight": {"train", "pretrained", "sharding", "config", "storage", "runtime", "errors"},
    "benchmark": {
        "train", "build", "models", "quantizers", "pretrained", "config", "runtime", "sharding", "preflight", "errors",
    },
    "main": {
        "", "train", "preflight", "config", "checkpoint", "distributed", "storage", "runtime", "errors",
    },
}  # fmt: skip
ONLY_IN = {
    "orbax": {"checkpoint"},
    "optax": {"train"},
    "tensorboardX": {"train"},
    "wandb": {"train"},
    "rich": {"progress", "train", "commands", "preflight", "benchmark"},
    "grain": {"data"},
    "tensorflow_datasets": {"data"},
    "PIL": {"data"},
    "pyarrow": {"data"},
    "fsspec": {"storage"},
    "etils": {"storage"},
    "gcsfs": {"storage"},
    "skimage": {"data"},
    "sklearn": {"data", "evaluation"},
    "dm_pix": {"evaluation"},
    "torch": {"pretrained", "benchmark"},
    "safetensors": {"pretrained", "benchmark"},
    "huggingface_hub": {"pretrained"},
    "transformers": {"pretrained", "benchmark"},
    "matplotlib": {"evaluation", "benchmark"},
    "gradio": {"commands"},
    "ml_collections": {"main", "config"},
    "pydantic": {"config"},
    "tensorflow": set(),
}


def room(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import; write it in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_file_keeps_the_law(path):
    here, text = room(path), path.read_text()
    tree = ast.parse(text)
    for name in imports(tree):
        top, *rest = name.split(".")
        if top == "vqrae_jax":
            target = rest[0] if rest[0] != "__version__" else ""
            assert target == here or target in MAY_IMPORT[here], f"{here} may not import {target}"
        elif top in ONLY_IN:
            assert here in ONLY_IN[top], f"{top} comes in by {ONLY_IN[top]} only"
    assert len(text.splitlines()) <= MAX_LINES, "one subject per file"
    modules = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and "Module" in map(ast.unparse, n.bases)]
    assert not modules or here in {"models", "quantizers"}, "networks live in models or quantizers"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_public_things_say_what_they_are(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not tree.body, "the file says what it is about"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            trivial = isinstance(node, ast.FunctionDef) and (len(node.body) <= 3 or node.name == "main")
            assert ast.get_docstring(node) or trivial, f"{node.name} has no docstring"


def test_no_drawer_for_everything():
    names = {p.stem for p in PACKAGE.rglob("*")} & {"utils", "util", "common", "helpers", "misc"}
    assert not names


def test_importing_the_package_is_fast_and_starts_nothing():
    script = (
        "import time; t = time.perf_counter(); import vqrae_jax; s = time.perf_counter() - t\n"
        "import sys\n"
        "heavy = {'jax', 'flax', 'optax', 'orbax', 'grain', 'torch', 'transformers', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import vqrae_jax.inference.tokenizer\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "training = {'optax', 'grain', 'tensorboardX', 'torch', 'tensorflow', 'transformers'} & set(sys.modules)\n"
        "assert not training, training\n"
        "print(s)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.5


def test_style():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
