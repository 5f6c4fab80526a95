"""Checks that requirements.txt and pyproject.toml agree and cover all imports."""

import ast
import importlib.metadata
import pathlib
import re
import sys
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Installed by tensorflow-datasets (protobuf), jax, pydantic and gradio.
INDIRECT = {"google", "ml_dtypes", "pydantic_core", "starlette"}


def requirement_lines(text):
    return [line.partition("#")[0].strip() for line in text.splitlines() if line.partition("#")[0].strip()]


def package_names(requirements):
    return {re.split(r"[<>=\[]", line)[0].lower().replace("_", "-") for line in requirements}


def test_requirements_equal_the_dependencies_of_the_package():
    running, tests = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n# tests\n")
    assert PROJECT["dependencies"] == requirement_lines(running)
    assert package_names(requirement_lines(tests)) >= {"chex", "hypothesis", "pytest", "pytest-xdist", "ruff"}


def test_every_import_is_a_dependency():
    extras = PROJECT["optional-dependencies"].values()
    declared = package_names([*PROJECT["dependencies"], *(line for extra in extras for line in extra)])
    providers = importlib.metadata.packages_distributions()
    nodes = [n for file in (ROOT / "vqrae_jax").rglob("*.py") for n in ast.walk(ast.parse(file.read_text("utf-8")))]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    packages = {name.split(".")[0] for name in imported} - sys.stdlib_module_names - INDIRECT - {"vqrae_jax"}
    assert len(packages) > 20
    for package in packages:
        assert package_names(providers.get(package, [package])) & declared, f"{package} is missing in pyproject.toml"
