"""The network of the Frechet inception distance equals one in PyTorch, recorded in `golden/inception`."""

import json
import re

import jax
import numpy as np
import pytest

from vqrae_jax.errors import WeightsError
from vqrae_jax.models.inception import Inception
from vqrae_jax.pretrained.judge_weights import read_inception
from vqrae_jax.resize import resize


@pytest.fixture(scope="module")
def recorded(golden):
    """The recipe of the weights, and PyTorch's inputs and outputs."""
    folder = golden / "inception"
    return json.loads((folder / "recipe.json").read_text()), np.load(folder / "io.npz")


@pytest.fixture(scope="module")
def shapes():
    return jax.eval_shape(Inception().init, jax.random.key(0), np.zeros((1, 299, 299, 3), np.float32))["params"]


def random_file(recipe):
    """Generates the random weights of the recipe, in the order of the file."""
    rng, state = np.random.default_rng(recipe["seed"]), {}
    for name, shape in recipe["shapes"].items():
        x = rng.standard_normal(shape, dtype=np.float32)
        if name.endswith(("running_var", "bn.weight")):
            state[name] = 1 + (0.5 if name.endswith("running_var") else 0.2) * np.tanh(x)
        else:
            scale = np.sqrt(2 / np.prod(shape[1:])) if len(shape) == 4 else 0.05 if name == "fc.weight" else 0.1
            state[name] = x * np.float32(scale)
    return state


def test_features_and_scores_equal_pytorch(recorded, shapes, tmp_path, assert_close):
    recipe, io = recorded
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    learned = [x for path, x in leaves if not re.search("mean|var", jax.tree_util.keystr(path))]
    assert sum(x.size for x in learned) == recipe["parameters"] == 23_850_960
    np.savez(tmp_path / "inception.npz", **random_file(recipe))
    params = read_inception(shapes, str(tmp_path / "inception.npz"), "evaluation.inception_path")
    images = io["images"].astype(np.float32) / 255

    def run(params, images):
        return Inception().apply({"params": params}, images, capture_intermediates=True)

    (features, logits, spatial), intermediates = jax.jit(run)(params, images)
    for name, shape in recipe["maps"].items():
        tap = np.asarray(intermediates["intermediates"][name]["__call__"][0])
        assert [tap.shape[i] for i in (3, 1, 2)] == shape
        assert_close(np.linalg.norm(tap.reshape(2, -1), axis=1), io[f"l2_{name}"], 1e-4, name)
    assert_close(features, io["features"], 1e-4, "features")
    assert_close(logits, io["logits"], 1e-4, "logits")
    branch = intermediates["intermediates"]["Mixed_6d"]["branch1x1"]["__call__"][0]
    np.testing.assert_array_equal(spatial, branch[..., :7].reshape(2, 2023))


def test_resize_equals_tensorflow_1(recorded, assert_close):
    _, io = recorded
    resized = resize(io["images"].astype(np.float32), 299, 299, "bilinear_tf1")
    assert_close(resized[:, ::37, ::41], io["resized_rows"], 1e-5)


def test_another_network_is_refused(shapes, tmp_path):
    np.savez(tmp_path / "other.npz", **{"features.0.weight": np.zeros((64, 3, 3, 3), np.float32)})
    with pytest.raises(WeightsError, match=r"missing \(472\)"):
        read_inception(shapes, str(tmp_path / "other.npz"), "evaluation.inception_path")
    with pytest.raises(WeightsError, match=r"evaluation.inception_path='/absent.pth'"):
        read_inception(shapes, "/absent.pth", "evaluation.inception_path")
