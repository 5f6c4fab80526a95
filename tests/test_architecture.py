"""The architecture: who may import whom, where outside libraries enter, room sizes, and the language of the code."""

import ast
import functools
import io
import itertools
import pathlib
import re
import subprocess
import sys
import tokenize

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "vqrae_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# Room (top-level module or folder) -> the rooms it may import. "": the package itself, for its version.
MAY_IMPORT = {
    "__init__": {"config", "models", "inference"},  # the public names, on first use
    "errors": set(),
    "runtime": set(),
    "resize": set(),
    "losses": set(),
    "generation": {"errors"},
    "storage": {"runtime", "errors"},
    "hub": {"storage", "errors"},
    "distributed": {"peers", "runtime", "errors"},
    "peers": set(),
    "progress": set(),
    "sharding": {"quantizers", "errors"},
    "config": {"generation", "quantizers", "errors"},
    "data": {"hub", "storage", "runtime", "errors"},
    "checkpoint": {"", "distributed", "runtime", "storage", "errors"},
    "quantizers": {"resize", "errors"},
    "models": {"losses", "quantizers", "resize"},
    "pretrained": {"hub", "storage", "errors"},
    "build": {"models", "quantizers", "pretrained", "config", "sharding", "storage", "errors"},
    "evaluation": {"", "build", "config", "data", "sharding", "distributed", "storage", "progress", "errors"},
    "inference": {
        "", "build", "models", "generation", "quantizers", "pretrained", "data", "evaluation", "sharding",
        "checkpoint", "config", "resize", "storage", "errors",
    },
    "commands": {
        "build", "generation", "quantizers", "pretrained", "data", "evaluation", "inference", "sharding", "config",
        "distributed", "storage", "runtime", "progress", "errors",
    },
    "train": {
        "", "build", "models", "generation", "quantizers", "losses", "data", "evaluation", "inference", "sharding",
        "checkpoint", "config", "distributed", "storage", "runtime", "progress", "errors",
    },
    "preflight": {
        "train", "build", "generation", "pretrained", "sharding", "config", "storage", "runtime", "errors",
    },
    "benchmark": {
        "train", "build", "models", "quantizers", "pretrained", "config", "runtime", "sharding", "preflight", "errors",
    },
    "main": {
        "", "train", "build", "preflight", "inference", "config", "checkpoint", "distributed", "storage", "runtime",
        "errors",
    },
}  # fmt: skip

# Outside library -> the rooms in which it is imported.
ONLY_IN = {
    "orbax": {"checkpoint"},
    "optax": {"train"},
    "tensorboardX": {"train"},
    "wandb": {"train"},
    "rich": {"train", "commands", "preflight", "benchmark"},
    "dm_pix": {"evaluation"},
    "grain": {"data"},
    "tensorflow_datasets": {"data"},
    "PIL": {"data"},
    "pyarrow": {"data"},
    "fsspec": {"storage"},
    "etils": {"storage"},
    "gcsfs": {"storage"},
    "skimage": {"data"},
    "sklearn": {"data", "evaluation"},
    "torch": {"pretrained", "benchmark"},
    "safetensors": {"pretrained", "benchmark", "inference"},  # inference: exported.py works without this package
    "huggingface_hub": {"hub", "pretrained"},
    "transformers": {"benchmark"},
    "matplotlib": {"evaluation", "benchmark"},
    "gradio": {"commands"},
    "ml_collections": {"main", "config"},
    "pydantic": {"config", "data"},
    "yaml": {"config"},
    "tensorflow": set(),
}

# Lines per room. A feature that needs more looks first for what it makes unnecessary.
BUDGET = {
    "__init__": 31, "benchmark": 991, "build": 899, "checkpoint": 435, "commands": 2342, "config": 1522, "data":
    2718, "distributed": 289, "errors": 124, "evaluation": 1669, "generation": 590, "inference": 2894, "losses":
    255, "main": 262, "models": 1794, "preflight": 1301, "pretrained": 1546, "progress": 43, "quantizers": 2713,
    "hub": 96, "peers": 120, "resize": 71, "runtime": 304, "sharding": 207, "storage": 417, "train": 2581,
}  # fmt: skip
TOTAL = 26_214

REPEATED = {"__init__", "__main__", "tokenizer", "generator", "encoder", "report"}  # file names of several rooms

IDIOMS = re.compile(
    r"\b(is|are|was|be) told\b|\btells?\b|\btold\b|(?<!here )\b(are|is) none\b|(?<!here )\bis no [a-z]+|"
    r"\bwould else\b|\bbe had\b|\bgone? on with\b|\banew\b|\bof what\b|\bbeside\b|\bpaint(s|ed)?\b|\bthe origin\b"
)
FRAGMENT = re.compile(r"(Of|What|Whether|That|Beside|Besides|So|As|To|From|If|Where|Which|Who|No more|More)\b")
ODD_NAMES = {
    "found", "given", "told", "there", "wanted", "painted", "said", "where", "kept", "drawn", "taken", "seen", "known",
    "here", "others", "place", "put", "chosen", "asked", "made", "wants",
}  # fmt: skip


def room(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def parse(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import; write it in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_rooms(path: pathlib.Path):
    for name in imports(parse(path)):
        top, *rest = name.split(".")
        if top == "vqrae_jax" and (target := rest[0] if rest[0] != "__version__" else "") != room(path):
            yield target


def prose(path: pathlib.Path):
    """Yields the comments and docstrings of a file."""
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.COMMENT:
            yield token.string
    yield from docstrings(path)


def docstrings(path: pathlib.Path):
    for node in ast.walk(parse(path)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
            yield text


def by_file(test):
    return pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))(test)


@by_file
def test_imports_keep_the_law(path):
    assert set(imported_rooms(path)) <= MAY_IMPORT[room(path)]
    for name in imports(parse(path)):
        top = name.split(".")[0]
        assert room(path) in ONLY_IN.get(top, {room(path)}), f"{top} is imported in {ONLY_IN[top]} only"


def test_the_law_is_tight_and_without_circles():
    used = {name: set() for name in MAY_IMPORT}
    for path in FILES:
        used[room(path)] |= set(imported_rooms(path))
    assert used == MAY_IMPORT
    remaining = {name: targets - {"", "__init__"} for name, targets in used.items()}
    while ready := {name for name, targets in remaining.items() if not targets & remaining.keys()}:
        remaining = {name: targets for name, targets in remaining.items() if name not in ready}
    assert not remaining, f"rooms import each other: {sorted(remaining)}"


@by_file
def test_networks_and_errors_have_their_rooms(path):
    classes = [node for node in ast.walk(parse(path)) if isinstance(node, ast.ClassDef)]
    bases = {base.split(".")[-1] for node in classes for base in map(ast.unparse, node.bases)}
    assert "Module" not in bases or room(path) in {"models", "quantizers"} or path.stem == "torch_stages"
    assert not {b for b in bases if b.endswith(("Error", "Exception"))} or path.name in {"errors.py", "loop.py"}


@by_file
def test_only_runtime_uses_the_environment(path):
    nodes = [node for node in ast.walk(parse(path)) if isinstance(node, ast.Attribute) and node.attr == "environ"]
    assert not nodes or path.name == "runtime.py" or room(path) == "benchmark"  # there for a child process


def test_no_folder_of_tests_is_left_out(pytestconfig):
    folders = [path for path in (ROOT / "tests").rglob("*") if path.is_dir()]
    assert not [path for path in folders if any(map(path.match, pytestconfig.getini("norecursedirs")))]


def test_assertions_can_fail():
    """`assert a, b == c` checks only a, and nothing differs from itself."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Assert):
                name = f"{path.relative_to(ROOT)}:{node.lineno}"
                assert not isinstance(node.msg, (ast.Compare, ast.BoolOp)), name
                for compare in (part for part in ast.walk(node.test) if isinstance(part, ast.Compare)):
                    sides = [ast.unparse(side) for side in (compare.left, *compare.comparators)]
                    assert all(a != b for a, b in itertools.pairwise(sides)), name


def test_budgets_of_rooms():
    lines = dict.fromkeys(BUDGET, 0)
    for path in FILES:
        lines[room(path)] += len(path.read_text().splitlines())
    over = {name: (count, BUDGET[name]) for name, count in lines.items() if count > BUDGET[name]}
    assert not over
    assert sum(lines.values()) <= TOTAL


def test_file_names_say_what_is_in_them():
    names = [path.stem for path in FILES]
    assert not set(names) & {"utils", "util", "common", "helpers", "misc"}
    assert {name for name in names if names.count(name) > 1} <= REPEATED


@by_file
def test_public_names_have_docstrings(path):
    tree = parse(path)
    assert ast.get_docstring(tree) or not tree.body, "the file says what it is about"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            trivial = isinstance(node, ast.FunctionDef) and (len(node.body) <= 3 or node.name == "main")
            assert ast.get_docstring(node) or trivial, f"{node.name} has no docstring"


@by_file
def test_language_is_plain(path):
    """See CONTRIBUTING.md: docstrings start with a verb or a noun phrase; idioms and vague names are avoided."""
    fragments = [text.splitlines()[0] for text in docstrings(path) if FRAGMENT.match(text)]
    assert not fragments
    idioms = [match[0] for text in prose(path) for match in IDIOMS.finditer(text)]
    assert not idioms
    nodes = list(ast.walk(parse(path)))
    names = {node.arg for node in nodes if isinstance(node, ast.arg)}
    names |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    assert not names & ODD_NAMES


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
