import pytest

from vqrae_jax.preflight.chips import CHIPS, parse_topology, positions
from vqrae_jax.preflight.hlo import Collective
from vqrae_jax.preflight.roofline import Roofline, network_seconds, scaling_efficiency, weak_scaling


def seconds(kind, topology, group, slices=1):
    topology = parse_topology(topology, slices)
    return network_seconds(Collective(kind, (tuple(group),), 1e9, 1.0), topology, positions(topology))


def test_rings_use_the_whole_link_and_open_lines_half_and_gpus_of_several_hosts_the_network():
    link = CHIPS["v5e"].link
    assert seconds("all-reduce", "v5e:16x16", range(256)) == pytest.approx(2 * 255 / 256 * 1e9 / (2 * link))
    assert seconds("all-gather", "v5e:16x16", range(16)) == pytest.approx(15 / 16 * 1e9 / link)  # one row
    assert seconds("all-gather", "v5e:2x4", range(8)) == pytest.approx(7 / 8 * 1e9 / link)  # two open lines
    assert seconds("reduce-scatter", "v5e:16x16", range(2)) == pytest.approx(1 / 2 * 1e9 / (link / 2))  # part of a row
    assert seconds("all-gather", "v5p:4x4x4", range(64)) == pytest.approx(63 / 64 * 1e9 / (3 * CHIPS["v5p"].link))
    chip = CHIPS["tpu7x"]
    assert seconds("all-gather", "tpu7x:2x2x1", range(2)) == pytest.approx(1 / 2 * 1e9 / chip.core_link)  # one chip
    # Both cores of a chip receive each byte once; a core whose neighbor is in another group has half of the links.
    assert seconds("all-gather", "tpu7x:4x4x4", range(128)) == pytest.approx(127 / 128 * 1e9 / (6 * chip.link))
    assert seconds("all-gather", "tpu7x:4x4x4", range(0, 128, 2)) == pytest.approx(63 / 64 * 1e9 / (3 * chip.link))
    assert seconds("all-reduce", "tpu7x:2x2x1", (0, 8), 2) == pytest.approx(1e9 / chip.network)  # in two slices
    chip = CHIPS["h200"]
    assert seconds("all-gather", "gpu:16xh200", range(8)) == pytest.approx(7 / 8 * 1e9 / chip.link)
    assert seconds("all-gather", "gpu:16xh200", range(16)) == pytest.approx(15 / 16 * 1e9 / chip.network)


def test_weak_scaling_covers_8_to_256_devices():
    """One all-reduce of a gigabyte, by hand."""
    collectives = [Collective("all-reduce", (tuple(range(256)),), 1e9, 1.0)]
    slices = {size.topology: size for size in weak_scaling(collectives, parse_topology("v5e:16x16"))}
    assert list(slices) == ["v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16"]
    assert [size.rate for size in slices.values()] == [9e10, 9e10, 9e10, 9e10, 1.35e11, 1.8e11]
    for size in slices.values():
        assert size.network == pytest.approx(2 * 1e9 * (size.devices - 1) / size.devices / size.rate)
    cubes = weak_scaling(collectives, parse_topology("v5p:4x4x4"))
    assert [size.devices for size in cubes] == [8, 16, 32, 64, 128, 256]
    pairs = weak_scaling(collectives, parse_topology("tpu7x:2x2x1"))
    assert [size.devices for size in pairs] == [8, 16, 32, 64, 128, 256]
    assert pairs[-2].rate == cubes[-3].rate  # 4 x 4 x 4
    assert [size.rate for size in weak_scaling(collectives, parse_topology("gpu:8xh100"))][:2] == [4.5e11, 5e10]
    assert weak_scaling(collectives, parse_topology("cpu:8")) == []


def test_the_slowest_resource_is_the_bound_and_scaling_efficiency():
    bounds = Roofline(compute=2.0, memory=3.0, network=1.0)
    assert (bounds.bound, bounds.fastest, bounds.slowest) == ("memory", 3.0, 4.0)
    assert scaling_efficiency(0.2, 0.1, 0.1) == (1, 1)
    assert scaling_efficiency(0.2, 0.3, 0.1) == pytest.approx((0.3 / 0.5, 0.2 / 0.3))
    assert scaling_efficiency(0.2, 0.1) == pytest.approx((0.2 / 0.3, 1))
