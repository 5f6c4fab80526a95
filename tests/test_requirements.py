"""What is installed: requirements.txt for a checkout and its tests, pyproject.toml's dependencies for the package."""

import ast
import importlib.metadata
import pathlib
import re
import sys
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BROUGHT = {"google", "ml_dtypes"}  # protobuf, by tensorflow-datasets; by jax


def lines(part):
    return [line.partition("#")[0].strip() for line in part.splitlines() if line.partition("#")[0].strip()]


def names(requirements):
    return {re.split(r"[<>=\[]", line)[0].lower().replace("_", "-") for line in requirements}


def test_the_package_wants_what_a_checkout_wants_but_for_the_tests():
    running, tests = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n# tests\n")
    assert PROJECT["dependencies"] == lines(running)
    assert names(lines(tests)) == {"chex", "hypothesis", "pytest", "pytest-xdist", "ruff"}


def test_everything_that_the_package_imports_is_wanted():
    extras = PROJECT["optional-dependencies"].values()
    wanted = names([*PROJECT["dependencies"], *(line for extra in extras for line in extra)])
    providers = importlib.metadata.packages_distributions()
    nodes = [n for file in (ROOT / "vqrae_jax").rglob("*.py") for n in ast.walk(ast.parse(file.read_text("utf-8")))]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    tops = {name.split(".")[0] for name in imported} - sys.stdlib_module_names - BROUGHT - {"vqrae_jax"}
    assert len(tops) > 20
    for top in tops:
        assert names(providers.get(top, [top])) & wanted, f"{top} is not wanted by pyproject.toml"
