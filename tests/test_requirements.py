"""Checks that pyproject.toml covers all imports, and that its dependencies without extras suffice for inference."""

import ast
import importlib.metadata
import pathlib
import sys
import tomllib

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Installed by orbax-checkpoint (protobuf), jax, pydantic and gradio.
INDIRECT = {"google", "ml_dtypes", "pydantic_core", "starlette"}


def package_names(requirements):
    return {canonicalize_name(Requirement(line).name) for line in requirements}


def test_requirements_install_the_checkout_for_training_and_tests():
    lines = [line for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
    assert lines == ["-e .[train,dev]"]
    assert package_names(EXTRAS["dev"]) >= {"chex", "hypothesis", "pytest", "pytest-xdist", "ruff"}


def test_every_import_is_a_dependency():
    declared = package_names([*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)])
    providers = importlib.metadata.packages_distributions()
    nodes = [n for file in (ROOT / "vqrae_jax").rglob("*.py") for n in ast.walk(ast.parse(file.read_text("utf-8")))]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    packages = {name.split(".")[0] for name in imported} - sys.stdlib_module_names - INDIRECT - {"vqrae_jax"}
    assert len(packages) > 20
    for package in packages:
        names = {canonicalize_name(name) for name in providers.get(package, [package])}
        assert names & declared, f"{package} is missing in pyproject.toml"


def test_metadata_of_the_license_agree():
    assert (PROJECT["license"], PROJECT["license-files"]) == ("Apache-2.0", ["LICENSE"])
    assert "Copyright 2026 The vqrae_jax authors" in (ROOT / "LICENSE").read_text("utf-8")
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert "\nlicense: Apache-2.0\n" in citation
    for url in PROJECT["urls"].values():
        assert url in citation
        assert url in (ROOT / "README.md").read_text("utf-8")


def light_modules():
    """Returns the modules of all distributions that `pip install vqrae-jax` installs, without extras."""
    distributions, pending = set(), [(line, "") for line in PROJECT["dependencies"]]
    while pending:
        line, extra = pending.pop()
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for option in {"", *requirement.extras}:
            if (name, option) not in distributions:
                distributions.add((name, option))
                pending += [(child, option) for child in importlib.metadata.requires(name) or ()]
    names = {name for name, _ in distributions}
    providers = importlib.metadata.packages_distributions()
    return {module for module, owners in providers.items() if names & {canonicalize_name(name) for name in owners}}


BLOCK = """
import sys
from importlib.machinery import PathFinder

class Light(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in BLOCKED else super().find_spec(name, path, target)

sys.meta_path = [Light if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.fixture(scope="module")
def run_light(run_elsewhere):
    """A function that runs code in a folder, in a process that can import only what the light package installs."""
    blocked = set(importlib.metadata.packages_distributions()) - light_modules() - {"vqrae_jax"}
    assert {"grain", "tensorboardX", "pyarrow", "matplotlib", "skimage", "sklearn", "tensorflow_datasets"} <= blocked

    def run(code, folder):
        return run_elsewhere("-c", f"BLOCKED = {blocked!r}\n{BLOCK}\n{code}", folder=folder)

    return run


@pytest.mark.slow
def test_inference_needs_no_extra(run_light, trained, untrained, tmp_path):
    """Runs and saved folders load, encode, decode and are saved; quantizers are layers; a command reconstructs."""
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8))
    untrained().save_pretrained(tmp_path / "saved")
    code = f"""
import jax, numpy as np
from vqrae_jax import Tokenizer
from vqrae_jax.commands.__main__ import main
from vqrae_jax.data.images import write_image
from vqrae_jax.quantizers import EMAQuantizer

images = np.load("images.npy")
Tokenizer.load({str(trained)!r}).save_pretrained("copy", images)
assert Tokenizer.load("saved").code_shape == (4, 4)
layer = EMAQuantizer(num_embeddings=8, channels=4)
layer.apply(layer.init(jax.random.key(0), images[..., :1] / 255 * np.ones(4)), np.ones((2, 4)))
write_image("image.png", images[0])
main(["reconstruct", "--checkpoint=copy", "--image=image.png", "--output=out.png"])
"""
    run_light(code, tmp_path)
    assert (tmp_path / "out.png").is_file()


MISSING = {  # code that needs an extra -> the extra
    "from vqrae_jax.train import loop": "train",
    "from vqrae_jax.data.parquet import Tables; Tables('x.parquet')": "train",
    "from vqrae_jax.data.code_shards import read_shard; read_shard('x.array_record')": "train",
    "from vqrae_jax.data.tfds_source import Prepared; Prepared('mnist', None, 'train', 'data.split')": "train",
    "from vqrae_jax.evaluation import visualize; visualize.curves({'a': {}}, 'png')": "train",
    "from vqrae_jax.commands.demo import import_gradio; import_gradio()": "demo",
}


def test_missing_packages_are_named(run_light, tmp_path):
    code = f"""
import vqrae_jax.commands.reconstruct, vqrae_jax.inference.tokenizer, vqrae_jax.quantizers
from vqrae_jax.errors import InstallError

for line in {list(MISSING)!r}:
    try:
        exec(line)
    except InstallError as error:
        print(error)
"""
    messages = run_light(code, tmp_path).splitlines()
    for message, extra in zip(messages, MISSING.values(), strict=True):
        assert message.endswith(f"which is not installed: pip install 'vqrae-jax[{extra}]'")
