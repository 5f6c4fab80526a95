import dataclasses

import jax
import numpy as np
import pytest

from vqrae_jax.build.tokenizer import build_tokenizer
from vqrae_jax.config import ModelConfig
from vqrae_jax.models import low_precision

MATRIX = (((1,), (0,)), ((), ()))
HEADS = (((1, 2), (0, 1)), ((), ()))


def test_int8_is_exact_where_eight_bits_hold_the_numbers():
    """Integers up to 127 whose rows and columns reach 127 are their own rounding."""
    rng = np.random.default_rng(0)
    x, w = (rng.integers(-127, 128, shape).astype(np.float32) for shape in ((5, 16), (16, 7)))
    x[:, 0], w[1] = 127, -127
    np.testing.assert_array_equal(low_precision.dot_general(x, w, MATRIX, bits="int8"), x @ w)


@pytest.mark.parametrize(("bits", "step"), [("int8", 0.5 / 127), ("fp8", 2.0**-4)])
def test_error_is_that_of_the_rounding(bits, step):
    """|error| <= sum |x| dw + |w| dx + dx dw, with dx, dw half a step of the largest (int8) or of each number (fp8)."""
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((6, 3, 8)), rng.standard_normal((3, 8, 10))
    got = low_precision.dot_general(x.astype(np.float32), w.astype(np.float32), HEADS, bits=bits)
    dx, dw = np.abs(x) * step, np.abs(w) * step
    if bits == "int8":
        dx = np.broadcast_to(np.abs(x).max((1, 2), keepdims=True) * step, x.shape)
        dw = np.broadcast_to(np.abs(w).max((0, 1), keepdims=True) * step, w.shape)
    else:  # numbers far below the largest are subnormal there
        dx, dw = dx + np.abs(x).max() * 2e-5, dw + np.abs(w).max() * 2e-5
    bound = sum(np.tensordot(a, b, 2) for a, b in ((np.abs(x), dw), (dx, np.abs(w)), (dx, dw)))
    error = np.abs(got - np.tensordot(x, w, 2))
    assert (error <= bound + 1e-5).all()
    assert error.max() > 0  # it did round


def test_a_token_of_zeros_stays_zero():
    x = np.zeros((2, 4), np.float32)
    np.testing.assert_array_equal(low_precision.dot_general(x, np.ones((4, 3), np.float32), MATRIX, bits="int8"), 0)


@pytest.mark.parametrize("bits", ["int8", "fp8"])
def test_features_of_an_encoder_in_eight_bits(golden, bits):
    folder = golden / "encoders" / "dinov2_with_registers"
    built = build_tokenizer(
        ModelConfig(encoder_config_path=str(folder), encoder_input_size=56, decoder_config_path="ViT-S")
    )
    encoder = built.module.encoder
    blocks = dataclasses.replace(encoder.vit.blocks, matmul=bits)
    quantized = encoder.clone(vit=dataclasses.replace(encoder.vit, blocks=blocks))
    variables, images = {"params": built.pretrained["encoder"]}, np.load(folder / "io.npz")["images_56"]
    exact, rounded = (np.asarray(jax.jit(e.apply)(variables, images)) for e in (encoder, quantized))
    error = np.sqrt(np.mean((exact - rounded) ** 2))  # the features have variance one
    assert 1e-4 < error < (0.05 if bits == "int8" else 0.2)
