import pytest

from vqrae_jax.errors import ConfigError
from vqrae_jax.preflight.chips import CHIPS, GPUS, SHAPES, parse, positions


def test_every_topology_that_is_listed_parses():
    for kind, shapes in SHAPES.items():
        for shape in shapes:
            topology = parse(f"{kind}:{shape}")
            assert (topology.platform, topology.chip) == ("tpu", CHIPS[kind])
    assert [parse(f"{kind}:{shape}").size for kind, shape in [("v5e", "16x16"), ("v5p", "4x4x4")]] == [256, 64]
    assert parse("gpu:16xh200").size == 16
    assert parse("cpu:8").chip is None
    assert set(GPUS) | set(SHAPES) == set(CHIPS)


@pytest.mark.parametrize(
    "text", ["v5e", "v5e:3x3", "v3:4x4", "gpu:8", "gpu:7xh100", "gpu:8xh300", "cpu:0", "cpu:x", ""]
)
def test_one_that_does_not_exist_is_answered_with_those_that_do(text):
    with pytest.raises(ConfigError, match=f"--topology='{text}' does not exist") as error:
        parse(text)
    for known in ("v5e:16x16", "v5p:4x4x4", "v4:2x2x1", "v6e:8x8", "h200", "cpu:64"):
        assert known in str(error.value)


def test_rings():
    """v5e and v6e wrap around along 16, cubes of v4 and v5p along multiples of four."""
    assert [parse("v5e:8x16").is_ring(axis) for axis in (0, 1)] == [False, True]
    assert [parse("v5p:2x4x4").is_ring(axis) for axis in (0, 1, 2)] == [False, True, True]


def test_positions_of_gpus_are_host_and_place():
    assert positions(parse("gpu:16xh100"))[7:9] == [(0, 7), (1, 0)]
