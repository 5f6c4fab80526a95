"""Shapes of the codes that a generator models, and vectors of the codes of a tokenizer."""

import jax
import numpy as np
import pytest

from vqrae_jax.build.generator import arrange_codes, code_vectors
from vqrae_jax.errors import ConfigError


@pytest.mark.parametrize(("shape", "prefixes", "side", "expected"), [
    ((4, 4), (), None, (((4, 4),), 1)), ((4, 4, 2), (), None, (((4, 4),), 2)), ((16,), (), 4, (((4, 4),), 1)),
    ((16, 2), (), 4, (((4, 4),), 2)), ((16, 16), (), 4, (((4, 4),), 16)), ((16, 16), (), None, (((16, 16),), 1)),
    ((5,), (1, 5), 2, (((1, 1), (2, 2)), 1)), ((7, 3), (), 0, (((1, 7),), 3)), ((8,), (1, 2, 4, 8), 0, (((1, 8),), 1)),
])  # fmt: skip
def test_codes_have_grids_and_levels(shape, prefixes, side, expected):
    assert arrange_codes(shape, prefixes, side) == expected


def test_rows_that_are_no_square_need_the_tokenizer():
    with pytest.raises(ConfigError) as error:
        arrange_codes((7,))
    assert error.value.field == "generator.tokenizer"


@pytest.mark.slow
@pytest.mark.parametrize("nested", [False, True])
def test_codes_of_free_tokens_have_vectors(untrained, nested):
    tokenizer = untrained(resampler_tokens=8, resampler_nested=nested)
    variables = jax.device_get(tokenizer.variables)
    vectors = code_vectors(tokenizer.module, variables, tokenizer.code_shape, 1)
    latents = tokenizer.lookup(np.arange(tokenizer.codebook_size).reshape(-1, 8)).reshape(tokenizer.codebook_size, -1)
    centered = latents - latents.mean(0)
    np.testing.assert_allclose(vectors[0], centered / centered.std(), atol=1e-5)
