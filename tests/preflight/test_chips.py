import pytest

from vqrae_jax.errors import ConfigError
from vqrae_jax.preflight.chips import CHIPS, GPUS, SHAPES, parse_topology, positions


def test_listed_topologies_parse():
    for kind, shapes in SHAPES.items():
        for shape in shapes:
            topology = parse_topology(f"{kind}:{shape}")
            assert (topology.platform, topology.chip) == ("tpu", CHIPS[kind])
    sizes = [parse_topology(name).size for name in ("v5e:16x16", "v5p:4x4x4", "tpu7x:4x4x4", "gpu:16xh200")]
    assert sizes == [256, 64, 128, 16]
    assert parse_topology("cpu:8").chip is None
    assert set(GPUS) | set(SHAPES) == set(CHIPS)


def test_error_of_an_unknown_topology_lists_those_that_exist():
    for name in ("v5e", "v5e:3x3", "v3:4x4", "gpu:8", "gpu:7xh100", "gpu:8xh300", "cpu:0", "cpu:x", ""):
        with pytest.raises(ConfigError) as error:
            parse_topology(name)
        assert (error.value.field, error.value.value) == ("--topology", name)
        names = ("tpu7x:2x2x1", "v5e:16x16", "v5p:4x4x4", "v4:2x2x1", "v6e:8x8", "h200", "cpu:64")
        assert all(existing in error.value.message for existing in names)


def test_rings_are_axes_of_16_or_of_whole_cubes_and_positions():
    assert [parse_topology("v5e:8x16").is_ring(axis) for axis in (0, 1)] == [False, True]
    for shape, closed in {"2x4x4": False, "4x4x4": True, "4x4x8": True}.items():  # whole cubes have switches
        assert [parse_topology(f"v5p:{shape}").is_ring(axis) for axis in (0, 1, 2)] == [closed] * 3
    slices = parse_topology("v5e:2x4", 2)
    assert (slices.size, positions(slices)[8]) == (16, (1, 0, 0, 0))
    assert positions(parse_topology("tpu7x:2x2x1"))[1:3] == [(0, 0, 0, 0, 1), (0, 0, 1, 0, 0)]
    assert positions(parse_topology("gpu:16xh100"))[7:9] == [(0, 7), (1, 0)]
