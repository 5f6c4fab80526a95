"""Weak scaling by hand: one all-reduce of a gigabyte."""

import pytest

from vqrae_jax.preflight import scaling
from vqrae_jax.preflight.chips import parse
from vqrae_jax.preflight.hlo import Collective

REDUCED = [Collective("all-reduce", (tuple(range(256)),), 1e9, 1.0, "")]


def test_every_slice_from_8_to_256_chips():
    sizes = {size.topology: size for size in scaling.sizes(REDUCED, parse("v5e:16x16"))}
    assert list(sizes) == ["v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16"]
    # Only axes of 16 are rings; the others turn back at their ends and carry half.
    assert [size.rate for size in sizes.values()] == [9e10, 9e10, 9e10, 9e10, 1.35e11, 1.8e11]
    for size in sizes.values():
        assert size.network == pytest.approx(2 * 1e9 * (size.chips - 1) / size.chips / size.rate)
    assert [size.chips for size in scaling.sizes(REDUCED, parse("v5p:4x4x4"))] == [8, 16, 32, 64, 128, 256]
    assert [size.rate for size in scaling.sizes(REDUCED, parse("gpu:8xh100"))][:2] == [4.5e11, 5e10]
    assert scaling.sizes(REDUCED, parse("cpu:8")) == []


def test_efficiency_is_against_the_smallest():
    small, large = (scaling.Size("", chips, 1e9, network) for chips, network in ((8, 0.1), (64, 0.3)))
    (first, second) = scaling.efficiency([small, large], 0.2)
    assert first == (1, 1)
    assert second == pytest.approx((0.3 / 0.5, 0.2 / 0.3))
