"""Generators of the configs have the sizes of the published ones, and steps of consistent shapes."""

import json
import math
import pathlib

import jax
import numpy as np
import pytest

from tests.configs.test_released import load
from vqrae_jax.build.generator import build_generator, variable_shapes
from vqrae_jax.config import epochs_to_steps
from vqrae_jax.errors import ConfigError
from vqrae_jax.preflight.chips import parse_topology
from vqrae_jax.preflight.programs import Plan, build_mesh
from vqrae_jax.train.generator import GeneratorTask

RECORDED = json.loads((pathlib.Path(__file__).parent / "parameter_counts.json").read_text())["generators"]
PUBLISHED = {  # config -> millions of parameters and codes in the paper or repository
    "generator_masked_b": (142, 16_384), "generator_masked_l": (480, 16_384), "generator_rar_b": (261, 1024),
    "generator_rar_l": (461, 1024), "generator_bits_b": (305, 2**18),
}  # fmt: skip


def count(generator):
    shapes = variable_shapes(build_generator(generator))["params"]
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_published(name):
    generator, (millions, codes) = load(name).generator, PUBLISHED[name]
    assert count(generator) == RECORDED[name]
    published = generator if generator.factors else generator.model_copy(update={"num_embeddings": codes})
    assert count(published) == pytest.approx(millions * 1e6, rel=0.01)


@pytest.mark.parametrize("name", ["generator_masked_b", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("generator_rar_b", "generator_bits_b"))])  # fmt: skip
def test_step_has_consistent_shapes(name, one_mesh):
    config = epochs_to_steps(load(name), lambda: 1_281_167)
    task, batch = (
        GeneratorTask.build(config, one_mesh),
        {"codes": np.zeros((2, 16, 16), np.int32), "label": np.zeros(2, np.int32)},
    )
    state = task.shapes()
    new_state, metrics = jax.eval_shape(task.step, state, {}, batch, 100)
    assert jax.tree.map(np.shape, new_state) == jax.tree.map(np.shape, state)
    assert "loss/total" in metrics


@pytest.mark.parametrize("family", ["autoregressive", "masked"])
def test_the_generator_of_cpus_is_planned_once_its_codes_are_named(family):
    config, topology = load("generator_cpu", family), parse_topology("cpu:8")
    mesh = build_mesh(config, jax.devices()[:8])
    with pytest.raises(ConfigError) as error:
        Plan.build(config, topology, mesh)
    assert error.value.field == "generator.grids"
    names = [f"generator.{name}" for name in ("grids", "levels", "num_embeddings", "classes")]
    assert all(name in error.value.message for name in names)
    shape = {"grids": ((16, 16),), "levels": 1, "num_embeddings": 512, "classes": 9}
    config = config.model_copy(update={"generator": config.generator.model_copy(update=shape)})
    assert len(Plan.build(config, topology, mesh).programs()) == 3
