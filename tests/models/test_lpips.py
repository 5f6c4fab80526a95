"""LPIPS equals PyTorch's on random weights, which the recipe beside the recorded outputs regenerates."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax.errors import WeightsError
from vqrae_jax.models.lpips import LPIPS, unit_length
from vqrae_jax.pretrained.judge_weights import read_lpips

SHAPES = jax.eval_shape(LPIPS().init, jax.random.key(0), *[jnp.zeros((1, 16, 16, 3))] * 2)["params"]


@pytest.fixture(scope="module")
def files(golden, tmp_path_factory):
    """The trunk and the heads, as files under the names that torchvision and LPIPS give them."""
    recipe = json.loads((golden / "lpips" / "weights_recipe.json").read_text())
    rng = np.random.default_rng(recipe["seed"])
    tensors = {}
    for draw in recipe["draws"]:
        given = rng.standard_normal(draw["shape"])
        value = ((np.abs(given) if draw["name"].startswith("lin") else given) * draw["scale"]).astype(np.float32)
        assert value.flat[0] == pytest.approx(recipe["check_first_value"][draw["name"]], rel=1e-6)
        tensors[draw["name"]] = value
    folder = tmp_path_factory.mktemp("lpips")
    trunk, heads = folder / "trunk.npz", folder / "heads.npz"
    np.savez(trunk, **{n: t for n, t in tensors.items() if n.startswith("features")}, **{"head.fc.bias": np.zeros(9)})
    named = {f"{n}.model.1.weight": t.reshape(1, -1, 1, 1) for n, t in tensors.items() if n.startswith("lin")}
    np.savez(heads, **named)
    return str(trunk), str(heads)


def test_equals_pytorch(golden, files, assert_close):
    params = read_lpips(SHAPES, *files)
    recorded = np.load(golden / "lpips" / "io.npz")
    x0, x1 = ((recorded[n] + 1) / 2 for n in ("x0", "x1"))

    def mean(x, params):
        distance = LPIPS().apply({"params": params}, x, x1)
        return distance.mean(), distance

    (_, distance), gradient = jax.jit(jax.value_and_grad(mean, has_aux=True))(x0, params)
    assert_close(distance, recorded["per_image"], 2e-5)
    assert_close(gradient / 2, recorded["grad_x0_of_mean"], 2e-5)  # there pictures are in [-1, 1]


def test_no_features_no_nan():
    """Black trunks happen: zero features have a distance of zero and a gradient of zero."""
    gradient = jax.grad(lambda x: (unit_length(x) ** 2).sum())(jnp.zeros((2, 4)))
    np.testing.assert_array_equal(gradient, np.zeros((2, 4)))


def test_half_precision_is_near_pytorch(golden, files):
    """With a bfloat16 trunk, on the recorded pictures."""
    recorded = np.load(golden / "lpips" / "io.npz")
    x0, x1 = ((recorded[n] + 1) / 2 for n in ("x0", "x1"))
    distance = jax.jit(LPIPS("bfloat16").apply)({"params": read_lpips(SHAPES, *files)}, x0, x1)
    assert distance.dtype == jnp.float32
    np.testing.assert_allclose(distance, recorded["per_image"], rtol=0.01)


def test_missing_files_name_the_field(files):
    with pytest.raises(WeightsError, match=r"loss\.perceptual\.heads='/nowhere/heads\.pth'"):
        read_lpips(SHAPES, files[0], "/nowhere/heads.pth")
    with pytest.raises(WeightsError, match="conv1_1/kernel"):
        read_lpips(SHAPES, files[1], files[1])
