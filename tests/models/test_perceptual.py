"""ConvNeXt equals PyTorch's; distances of pictures keep their laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax.build import judges
from vqrae_jax.config import PerceptualConfig
from vqrae_jax.errors import ConfigError, WeightsError
from vqrae_jax.models.convnext import ConvNeXt, ConvNeXtConfig
from vqrae_jax.pretrained.judge_weights import convert_convnext, read_convnext

ENCODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}


def test_convnext_equals_pytorch(golden, assert_close):
    """Random weights, recorded from transformers 5."""
    file, io = str(golden / "convnext" / "model.npz"), np.load(golden / "convnext" / "io.npz")
    fields, tensors = read_convnext(file, "loss.perceptual.path")
    assert fields == {"depths": (1, 1, 2, 1), "widths": (8, 12, 16, 20), "classes": 7}
    network = ConvNeXt(ConvNeXtConfig(**fields))
    target = jax.eval_shape(network.init, jax.random.key(0), io["pixels"])["params"]
    params = convert_convnext(tensors, target, file)
    assert_close(jax.jit(network.apply)({"params": params}, io["pixels"]), io["logits"], 1e-5)


@pytest.mark.parametrize("network", ["convnext", "encoder"])
def test_distances(golden, network):
    given = {"path": str(golden / "convnext" / "model.npz")} if network == "convnext" else {"architecture": ENCODER}
    config = PerceptualConfig(network=network, weight=1.0, input_size=32, layers=(0, -1), **given)
    critic = judges.build_perceptual(config)
    a, b = jax.random.uniform(jax.random.key(0), (2, 3, 32, 32, 3))

    @jax.jit
    def distance(params, x, y):
        return critic.module.apply({"params": params}, x, y)

    apart = distance(critic.params, a, b)
    assert apart.shape == (3,)
    assert np.all(apart > 0)
    np.testing.assert_allclose(distance(critic.params, a, a), 0, atol=1e-6)
    np.testing.assert_allclose(distance(critic.params, b, a), apart, rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda x: distance(critic.params, x, b).sum()))(a)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0


def test_missing_weights_say_how_to_do_without(tmp_path):
    """Which file or id, which field named it, which line switches the term off."""
    off = "without this term: --config.loss.perceptual.weight=0"
    with pytest.raises(WeightsError, match=rf"loss\.perceptual\.trunk='{tmp_path}/vgg\.npz'.*\n{off}"):
        judges.build_perceptual(PerceptualConfig(weight=1.0, trunk=f"{tmp_path}/vgg.npz"))
    with pytest.raises(WeightsError, match=rf"'timm/vgg16\.tv_in1k'.*\n{off}"):
        judges.build_perceptual(PerceptualConfig(weight=1.0))
    with pytest.raises(ConfigError, match=rf"name a ConvNeXt classifier.*\n{off}"):
        judges.build_perceptual(PerceptualConfig(weight=1.0, network="convnext"))
    np.savez(tmp_path / "other.npz", weight=jnp.zeros(2))
    with pytest.raises(WeightsError, match=rf"other\.npz'.*\n{off}"):
        judges.build_perceptual(PerceptualConfig(weight=1.0, network="convnext", path=f"{tmp_path}/other.npz"))
