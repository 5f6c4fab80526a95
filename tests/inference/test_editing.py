import jax
import numpy as np
import pytest

from vqrae_jax import Tokenizer
from vqrae_jax.build.tokenizer import build_tokenizer, variable_shapes
from vqrae_jax.errors import DataError
from vqrae_jax.inference import editing


@pytest.fixture(scope="module")
def tokenizer(untrained):
    return untrained()


def test_paste_cuts_at_the_edge():
    target, source = np.zeros((4, 4), int), np.arange(1, 17).reshape(4, 4)
    pasted = editing.paste(target, source, (1, 0, 3, 3), (2, 2))
    np.testing.assert_array_equal(pasted[2:, 2:], [[5, 6], [9, 10]])
    assert (pasted != 0).sum() == 4
    assert not target.any()


@pytest.mark.parametrize("fields", [
    {}, pytest.param({"quantizer": "residual"}, marks=pytest.mark.slow),
    pytest.param({"quantize_before_reshape": True, "quantizer_params": {"codebook_dim": 4}}, marks=pytest.mark.slow),
])  # fmt: skip
def test_blend_begins_and_ends_with_its_images(untrained, fields):
    tokenizer = untrained(**fields)
    first, second = np.random.default_rng(0).integers(0, tokenizer.codebook_size, (2, *tokenizer.code_shape))
    steps = editing.blend(tokenizer, first, second, [0.0, 0.5, 1.0])
    np.testing.assert_array_equal(steps[[0, 2]], [first, second])
    assert steps[1].shape == tokenizer.code_shape
    assert tokenizer.decode_from_indices(steps).shape == (3, 32, 32, 3)
    if "quantizer" not in fields:  # the quantizer chooses the same indices as are set at the ends
        np.testing.assert_array_equal(editing.blend(tokenizer, first, second, [1e-6])[0], first)


def test_middle_of_a_blend_is_the_code_nearest_to_the_mean(tokenizer):
    pair = np.random.default_rng(0).integers(0, 24, (2, 4, 4))
    middle = editing.blend(tokenizer, *pair, [0.5])[0]
    table = np.concatenate([tokenizer.lookup(np.full((1, 4, 4), k))[:, 0, 0] for k in range(24)])
    distance = ((table[pair].mean(0)[..., None, :] - table) ** 2).sum(-1)
    chosen = np.take_along_axis(distance, middle[..., None], -1)[..., 0]
    np.testing.assert_allclose(chosen, distance.min(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("weights", [[np.nan], [0.5, 1.5], [-0.1], 0.5])
def test_weights_of_a_blend_are_shares(tokenizer, weights):
    with pytest.raises(DataError, match="weights"):
        editing.blend(tokenizer, np.zeros((4, 4), int), np.zeros((4, 4), int), weights)


def test_nearest_patches_are_ordered_without_the_patch_itself():
    latents = np.asarray([[[0, 5], [1, 9]], [[0, 7], [8, 6]]], float)[..., None]
    assert editing.nearest_patches(latents, (0, 0, 0), 3) == [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert len(editing.nearest_patches(latents, (0, 0, 0), 99)) == 7


def test_decoded_patch_is_the_center_of_a_uniform_image(tokenizer):
    patches = editing.decode_patches(tokenizer, np.asarray([3, 5]))
    whole = tokenizer.decode_from_indices(np.full((1, 4, 4), 5))
    np.testing.assert_allclose(patches[1], whole[0, 16:24, 16:24], atol=1e-6)


@pytest.mark.slow
def test_indices_without_positions_are_refused(tokenizer):
    """Before any computation, so all variables are zeros."""

    def build(quantizer):
        config = tokenizer.config.model_copy(update={"quantizer": quantizer})
        built = build_tokenizer(config)
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), variable_shapes(built))
        return Tokenizer(built.module, zeros, config)

    with pytest.raises(DataError, match="several codes"):
        editing.decode_patches(build("residual"), np.zeros(1, int))
    with pytest.raises(DataError, match="one image"):
        editing.blend(tokenizer, np.zeros((1, 4, 4), int), np.zeros((4, 4), int), [0.5])
    with pytest.raises(DataError, match="positions"):
        editing.as_grid(build("multiscale"), np.zeros((1, 30), int))
