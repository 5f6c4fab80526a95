import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax import Tokenizer
from vqrae_jax.inference.tokenizer import TokenizerError


@pytest.fixture(scope="module")
def tokenizer(trained):
    return Tokenizer.load(trained)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(size=(3, 32, 32, 3)).astype(np.float32)


def test_codes_and_pictures(tokenizer, images):
    indices = tokenizer.encode_to_indices(images)
    assert indices.shape == (3, tokenizer.grid, tokenizer.grid) == (3, 4, 4)
    assert indices.dtype == np.int32
    assert 0 <= indices.min() <= indices.max() < tokenizer.codebook_size == 32
    pictures = tokenizer.decode_from_indices(indices)
    assert pictures.shape == (3, tokenizer.image_size, tokenizer.image_size, 3) == (3, 32, 32, 3)
    assert 0 <= pictures.min() <= pictures.max() <= 1
    np.testing.assert_allclose(tokenizer.reconstruct(images), pictures, atol=1e-5)
    np.testing.assert_allclose(tokenizer.decode(tokenizer.encode(images)), pictures, atol=1e-5)


def test_bytes_jax_arrays_and_other_sizes_are_taken(tokenizer, images):
    as_bytes = (images * 255).astype(np.uint8)
    np.testing.assert_array_equal(
        tokenizer.encode_to_indices(as_bytes), tokenizer.encode_to_indices(jnp.asarray(as_bytes) / 255)
    )
    assert tokenizer.encode_to_indices(np.zeros((2, 50, 40, 3), np.uint8)).shape == (2, 4, 4)
    assert tokenizer.encode_to_indices(jnp.zeros((1, 32, 32, 3), jnp.bfloat16)).shape == (1, 4, 4)


def test_one_compilation_per_shape(trained, images):
    tokenizer = Tokenizer.load(trained)
    for batch in (images, images, images[:1], images[1:2]):
        tokenizer.encode_to_indices(batch)
    assert tokenizer._compiled["encode_to_indices"]._cache_size() == 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((32, 32, 3), np.float32), r"shape \(32, 32, 3\).*images\[None\]"),
        (np.zeros((1, 3, 32, 32), np.float32), r"shape \(1, 3, 32, 32\).*channels come last"),
        (np.zeros((1, 32, 0, 3), np.float32), "shape"),
        (np.zeros((1, 32, 32, 3), np.int64), "images are int64; expected uint8, or floats"),
        (np.zeros((1, 32, 32, 3), bool), "images are bool"),
        (np.full((1, 32, 32, 3), 255.0), r"span \[255, 255\].*divide by 255"),
        (np.full((1, 32, 32, 3), -0.1), r"span \[-0\.1, -0\.1\]"),
        (np.full((1, 32, 32, 3), np.nan), "span"),
    ],
)
def test_images_that_are_none(tokenizer, bad, message):
    with pytest.raises(TokenizerError, match=message):
        tokenizer.encode_to_indices(bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((1, 4, 4), np.float32), "indices are float32; codes are integers"),
        (np.zeros((1, 5, 4), np.int32), r"shape \(1, 5, 4\); expected \[B, 4, 4\]"),
        (np.full((1, 4, 4), 32), r"span \[32, 32\]; the codes are 0 to 31"),
        (np.full((1, 4, 4), -1), r"span \[-1, -1\]"),
    ],
)
def test_codes_that_are_none(tokenizer, bad, message):
    with pytest.raises(TokenizerError, match=message):
        tokenizer.decode_from_indices(bad)
