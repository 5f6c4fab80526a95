"""Checks that all files, symbols and commands in the recipes of CONTRIBUTING.md exist, and follows the recipes."""

import importlib
import pathlib
import re
import shlex
import sys
import types
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax import commands, config
from vqrae_jax.build.encoder import build_encoder
from vqrae_jax.commands import __main__ as dispatch
from vqrae_jax.data import pipeline
from vqrae_jax.data.source import Source
from vqrae_jax.losses import reconstruction
from vqrae_jax.pretrained import families
from vqrae_jax.quantizers import factory, registry
from vqrae_jax.quantizers.base import Quantized, Quantizer, batch_metrics, flatten

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
RECIPES = {
    title: [" ".join(step.split()) for step in re.split(r"^\d+\. ", body, flags=re.M)[1:]]
    for title, body in re.findall(r"^### (Add .*?)\n(.*?)(?=^### |\Z)", TEXT, re.M | re.S)
}
STEPS = [pytest.param(title, step, id=f"{title}-{i}") for title in RECIPES for i, step in enumerate(RECIPES[title], 1)]


def test_recipes_have_at_most_eight_steps():
    assert len(RECIPES) == 5
    assert all(3 <= len(steps) <= 8 for steps in RECIPES.values())


def resolve(name):
    """Returns the object that a dotted name of the package stands for."""
    module, *attributes = name.split(".")
    value = importlib.import_module(module)
    for attribute in attributes:
        if isinstance(value, types.ModuleType) and not hasattr(value, attribute):
            value = importlib.import_module(f"{value.__name__}.{attribute}")
        else:
            value = getattr(value, attribute)
    return value


def find_paths(text):
    return re.findall(r"`([\w./]+(?:/|\.py|\.md|\.json))`", text)


@pytest.mark.parametrize(("title", "step"), STEPS)
def test_named_things_exist(title, step):
    """Paths exist (of new files, their folders), dotted names resolve, other names occur in a file of the recipe."""
    for path in find_paths(step):
        assert (ROOT / path).exists() or ("NAME" in path and (ROOT / path).parent.is_dir()), path
    files = [ROOT / path for path in find_paths(" ".join(RECIPES[title])) if (ROOT / path).is_file()]
    for name in set(re.findall(r"`([^`]+)`", step)) - set(find_paths(step)):
        if name.startswith("python -m pytest"):
            assert all((ROOT / path).exists() for path in shlex.split(name)[3:]), name
        elif name.startswith("vqrae_jax."):
            resolve(name)
        else:
            assert any(re.search(rf"\b{name}\b", file.read_text(encoding="utf-8")) for file in files), name


def test_commands_name_existing_paths():
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S):
        for path in re.findall(r"(?:-r |-n 0 |pytest )([\w./]+)", block):
            assert (ROOT / path).exists(), path


class SignQuantizer(Quantizer):
    """The sign of the only channel; two embeddings."""

    channels: int
    cost: Annotated[float, registry.Setting("not used", "quantizer_params.sign_cost", ge=0)] = 1.0
    num_embeddings = 2

    def __call__(self, z, train=False):
        flat, finite = flatten(z, self.channels)
        indices = (flat[:, 0] > 0).astype(jnp.int32)
        quantized = self.lookup(indices)
        metrics = batch_metrics(flat, quantized, indices, 2, finite)
        return Quantized(quantized.reshape(z.shape), indices.reshape(z.shape[:-1]), jnp.zeros(()), metrics)

    def lookup(self, indices):
        return (2.0 * indices - 1.0)[..., None]


def test_a_registered_quantizer_can_be_built(monkeypatch):
    monkeypatch.setattr(registry, "QUANTIZERS", dict(registry.QUANTIZERS))
    monkeypatch.setattr(factory, "QUANTIZERS", registry.QUANTIZERS)
    registry.register("sign", SignQuantizer, "none", "a test")
    assert "quantizer_params.sign_cost" in registry.all_settings()
    params = types.SimpleNamespace(sign_cost=0.5, whitening_dim=None, codebook_dim=None)
    model = types.SimpleNamespace(quantizer="sign", quantize_before_reshape=False, quantizer_params=params)
    quantizer = factory.create(model, channels=1, grid=4)
    assert quantizer == SignQuantizer(1, 0.5)
    z = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    result = quantizer.apply({}, z)
    np.testing.assert_array_equal(quantizer.apply({}, result.indices, method="lookup"), result.z)


def test_an_encoder_family_can_be_added(monkeypatch, golden):
    """A new family that reads DINOv2 files under another name gives the same encoder."""
    folder = str(golden / "encoders" / "dinov2")
    model = config.ModelConfig(encoder_config_path=folder, encoder_input_size=56)
    encoder, params = build_encoder(model)
    monkeypatch.setitem(families.FAMILIES, "NewFamily", families.FAMILIES["Dinov2withNorm"])
    new_encoder, new_params = build_encoder(model.model_copy(update={"encoder_cls": "NewFamily"}))
    assert new_encoder == encoder
    jax.tree.map(np.testing.assert_array_equal, new_params, params)


def test_a_loss_can_be_added(monkeypatch):
    monkeypatch.setitem(reconstruction.FEATURES, "largest", lambda a, b: jnp.max(jnp.abs(a - b)))
    assert reconstruction.feature_distance("largest", jnp.ones((2, 4)), jnp.zeros((2, 4)), 2) == 1


def test_a_command_can_be_added(monkeypatch):
    received = []
    module = types.SimpleNamespace(main=received.extend)
    monkeypatch.setitem(dispatch.COMMANDS, "new-command", "a test")
    monkeypatch.setitem(sys.modules, f"{commands.__name__}.new_command", module)
    dispatch.main(["new-command", "--step=3"])
    assert received == ["--step=3"]


def test_a_data_source_can_be_added(monkeypatch):
    class Constant(Source):
        def __init__(self, path, field):
            self.path, self.field = path, field

        def __len__(self):
            return 8

        def __getitem__(self, index):
            return {"image": np.full((8, 8, 3), index, np.uint8), "label": index}

        def name(self, index):
            return f"constant {index}"

    monkeypatch.setitem(pipeline.SOURCES, "constant", Constant)
    data = config.DataConfig(path="somewhere", image_size=8, batch_size=4).model_copy(update={"source": "constant"})
    assert pipeline.training_source(data).field == "data.path"
    batch = next(pipeline.train_batches(data, seed=0))
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])
