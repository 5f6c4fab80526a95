import functools
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType


@pytest.fixture(scope="session")
def mesh():
    """4x2 devices."""
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@functools.partial(jax.jit, static_argnums=0)
def _step(module, variables, z, key):
    return module.apply(variables, z, True, mutable=["batch_stats"], rngs={"codes": key})


@pytest.fixture(scope="session")
def train():
    """A function that trains a new module for some steps on z; returns the last output and the variables."""

    def run(module, z, steps=1):
        variables = jax.jit(module.init)(jax.random.key(0), z)
        for step in range(steps):
            out, state = _step(module, variables, z, jax.random.key(step))
            variables = {**variables, **state}
        return out, variables

    return run


@pytest.fixture(scope="session")
def crossings():
    """A function that lists the collective operations of a compiled program and the sizes of their results."""

    def find(text):
        calls = re.findall(r"= (.+?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\(", text)
        return [
            (kind, int(np.prod([int(n) for n in sizes.split(",") if n])))
            for shapes, kind in calls
            for sizes in re.findall(r"\[([\d,]*)\]", shapes)
        ]

    return find
