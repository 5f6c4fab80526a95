import dataclasses

import pytest

from vqrae_jax.preflight.advice import describe_float32, describe_images, float32_fields, in_bfloat16
from vqrae_jax.preflight.chips import CHIPS, GIB, parse_topology
from vqrae_jax.preflight.programs import Cost, Memory
from vqrae_jax.preflight.roofline import Roofline

V5E = parse_topology("v5e:4x4")
GIB_SECONDS = 2 * GIB / CHIPS["v5e"].bandwidth  # to read and write a GiB


@pytest.mark.parametrize(
    ("sections", "fields"),
    [
        ({}, ["model.dtype"]),
        ({"model": {"dtype": "bfloat16"}}, []),
        ({"model": {"dtype": "bfloat16"}, "adversary": {"discriminator": "patch"}}, ["adversary.dtype"]),
        ({"loss": {"perceptual": {"weight": 1.0}}}, ["model.dtype", "loss.perceptual.dtype"]),
    ],
)
def test_float32_is_named_for_networks_that_are_used_and_chips_that_are_faster_in_bfloat16(tiny, sections, fields):
    config = tiny(**sections)
    assert float32_fields(config) == fields
    assert float32_fields(in_bfloat16(config)) == []
    for topology, factor in (("v5e:4x4", " 6 "), ("gpu:8xh200", " 15 ")):
        text = describe_float32(config, parse_topology(topology))
        assert (factor in text) == bool(fields)
        assert [f"--config.{name}=bfloat16" in text for name in fields] == [True] * len(fields)
    assert describe_float32(config, parse_topology("cpu:8")) == ""


def test_few_images_per_chip_are_named_with_the_batch_that_fits():
    memory = Memory(arguments=5.0 * GIB, temporaries=2.0 * GIB)
    slow = Roofline(compute=0.001, memory=6 * GIB_SECONDS, network=0.004)
    train = Cost("train", 32, memory, True, {}, [], slow)
    text = describe_images(train, V5E)
    assert text.startswith("2 images per device")
    share = (5 * GIB_SECONDS + 0.004) / (6 * GIB_SECONDS + 0.004)
    assert f" {share:.0%} " in text
    assert "--config.data.batch_size=128" in text  # (15.75 - 5) / 2 = 5.4 times the temporaries fit
    full = dataclasses.replace(train, memory=Memory(5.0 * GIB, 8.0 * GIB))
    assert "batch_size" not in describe_images(full, V5E)
    for bounds in (Roofline(1.0, 6 * GIB_SECONDS, 0.004), Roofline(0.001, 60 * GIB_SECONDS, 0.004), None):
        assert describe_images(dataclasses.replace(train, roofline=bounds), V5E) == ""
