"""LPIPS equals PyTorch's on random weights, regenerated from a recorded recipe; distances follow their laws."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax.build import judges
from vqrae_jax.config import PerceptualConfig
from vqrae_jax.errors import WeightsError
from vqrae_jax.models.perceptual import LPIPS, SCALE, SHIFT, VGG16, unit_length
from vqrae_jax.pretrained.judge_weights import read_lpips

ENCODER = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
SHAPES = jax.eval_shape(LPIPS().init, jax.random.key(0), *[jnp.zeros((1, 16, 16, 3))] * 2)["params"]


@pytest.fixture(scope="module")
def files(golden, tmp_path_factory):
    """The trunk and the heads, as files under the names of torchvision and LPIPS."""
    recipe = json.loads((golden / "lpips" / "weights_recipe.json").read_text())
    rng = np.random.default_rng(recipe["seed"])
    tensors = {}
    for entry in recipe["draws"]:
        normal = rng.standard_normal(entry["shape"])
        value = ((np.abs(normal) if entry["name"].startswith("lin") else normal) * entry["scale"]).astype(np.float32)
        assert value.flat[0] == pytest.approx(recipe["check_first_value"][entry["name"]], rel=1e-6)
        tensors[entry["name"]] = value
    folder = tmp_path_factory.mktemp("lpips")
    trunk, heads = folder / "trunk.npz", folder / "heads.npz"
    np.savez(trunk, **{n: t for n, t in tensors.items() if n.startswith("features")}, **{"head.fc.bias": np.zeros(9)})
    lin = {f"{n}.model.1.weight": t.reshape(1, -1, 1, 1) for n, t in tensors.items() if n.startswith("lin")}
    np.savez(heads, **lin)
    return str(trunk), str(heads)


def test_lpips_equals_pytorch_and_is_near_it_in_half_precision(golden, files, assert_close):
    recorded, params = dict(np.load(golden / "lpips" / "io.npz")), read_lpips(SHAPES, *files)
    x0, x1 = ((recorded[n] + 1) / 2 for n in ("x0", "x1"))

    def mean(x, params):
        distance = LPIPS().apply({"params": params}, x, x1)
        return distance.mean(), distance

    (_, distance), gradient = jax.jit(jax.value_and_grad(mean, has_aux=True))(x0, params)
    assert_close(distance, recorded["per_image"], 2e-5)
    assert_close(gradient / 2, recorded["grad_x0_of_mean"], 2e-5)  # recorded for images in [-1, 1]
    both = jax.jit(LPIPS().apply, static_argnums=3)({"params": params}, x0, x1, True)
    np.testing.assert_array_equal(both[0], distance)
    features = [VGG16().apply({"params": params["trunk"]}, (2 * x - 1 - np.array(SHIFT)) / SCALE) for x in (x0, x1)]
    grams = [[jnp.einsum("bhwc,bhwd->bcd", *[unit_length(x)] * 2) / x[0, :, :, 0].size for x in xs] for xs in features]
    assert_close(both[1], sum(((a - b) ** 2).sum((1, 2)) for a, b in zip(*grams, strict=True)) / 5, 1e-5)
    distance = jax.jit(LPIPS("bfloat16").apply)({"params": params}, x0, x1)
    assert distance.dtype == jnp.float32
    np.testing.assert_allclose(distance, recorded["per_image"], rtol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["random", "siglip"])
def test_encoder_distances_are_distances_with_gradients(golden, encoder):
    """Those of tokens and of their Gram matrices."""
    settings = {"architecture": ENCODER}
    if encoder == "siglip":
        settings = {"path": str(golden / "encoders" / "siglip"), "encoder_cls": "SigLIP2wNorm"}
    network = judges.build_perceptual(
        PerceptualConfig(network="encoder", weight=1.0, input_size=32, layers=(0, -1), **settings)
    )
    a, b = jax.random.uniform(jax.random.key(0), (2, 3, 32, 32, 3))

    @jax.jit
    def distances(params, x, y):
        return jnp.stack(network.module.apply({"params": params}, x, y, True))

    apart = distances(network.params, a, b)
    assert apart.shape == (2, 3)
    assert np.all(apart > 0)
    np.testing.assert_array_equal(jax.jit(network.module.apply)({"params": network.params}, a, b), apart[0])
    np.testing.assert_allclose(distances(network.params, a, a), 0, atol=1e-6)
    np.testing.assert_allclose(distances(network.params, b, a), apart, rtol=1e-5)
    for gradient in jax.jit(jax.jacrev(lambda x: distances(network.params, x, b).sum(1)))(a):
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 0
    # Zero features have a zero gradient.
    assert not jax.grad(lambda x: (unit_length(x) ** 2).sum())(jnp.zeros((2, 4))).any()


def test_missing_lpips_weights_name_the_field(files, tmp_path):
    for trunk in (f"{tmp_path}/vgg.npz", PerceptualConfig().trunk):
        with pytest.raises(WeightsError) as error:
            judges.build_perceptual(PerceptualConfig(weight=1.0, trunk=trunk))
        assert (error.value.field, error.value.value) == ("loss.perceptual.trunk", trunk)
    with pytest.raises(WeightsError, match=r"loss\.perceptual\.heads='/nowhere/heads\.pth'"):
        read_lpips(SHAPES, files[0], "/nowhere/heads.pth")
    with pytest.raises(WeightsError, match="conv1_1/kernel"):
        read_lpips(SHAPES, files[1], files[1])
