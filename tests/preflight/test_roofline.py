import pytest

from vqrae_jax.preflight.chips import CHIPS, parse, positions
from vqrae_jax.preflight.hlo import Collective
from vqrae_jax.preflight.roofline import Roofline, network_seconds


def seconds(kind, text, group):
    topology = parse(text)
    return network_seconds(Collective(kind, (tuple(group),), 1e9, 1, ""), topology, positions(topology))


def test_a_torus_uses_every_link_and_an_open_line_half():
    link = CHIPS["v5e"].link
    assert seconds("all-reduce", "v5e:16x16", range(256)) == pytest.approx(2 * 255 / 256 * 1e9 / (2 * link))
    assert seconds("all-gather", "v5e:16x16", range(16)) == pytest.approx(15 / 16 * 1e9 / link)  # one row
    assert seconds("all-gather", "v5e:2x4", range(8)) == pytest.approx(7 / 8 * 1e9 / link)  # two open lines
    assert seconds("reduce-scatter", "v5e:16x16", range(2)) == pytest.approx(1 / 2 * 1e9 / (link / 2))  # part of a row
    assert seconds("all-gather", "v5p:4x4x4", range(64)) == pytest.approx(63 / 64 * 1e9 / (3 * CHIPS["v5p"].link))


def test_gpus_of_several_hosts_use_the_network():
    chip = CHIPS["h200"]
    assert seconds("all-gather", "gpu:16xh200", range(8)) == pytest.approx(7 / 8 * 1e9 / chip.link)
    assert seconds("all-gather", "gpu:16xh200", range(16)) == pytest.approx(15 / 16 * 1e9 / chip.network)


def test_what_binds():
    line = Roofline(compute=2.0, memory=3.0, network=1.0)
    assert (line.bound, line.fastest, line.slowest) == ("memory", 3.0, 4.0)
