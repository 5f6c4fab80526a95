"""The training step of the EMA quantizer and the search, compiled for TPU topologies on a machine without one."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from vqrae_jax import runtime

MIB, GIB = 2**20, 2**30
HBM = {"v5e": 16 * GIB, "v5p": 95 * GIB}

# Prints bytes per chip as JSON: arguments (the latents and the state) and temporaries.
STEP = """
import json, sys
import jax, jax.numpy as jnp
from vqrae_jax import sharding
from vqrae_jax.preflight import chips, programs
from vqrae_jax.quantizers.ema import EMAQuantizer

topology, count, model, N, K, C = sys.argv[1], *map(int, sys.argv[2:])
mesh = sharding.make_mesh(-1, model, programs.abstract_devices(chips.parse_topology(topology))[:count])
module = EMAQuantizer(K, C)
state = jax.eval_shape(lambda key: module.init(key, jnp.zeros((1, C))), jax.random.key(0))
placed = {"batch_stats": sharding.shardings({"quantizer": state["batch_stats"]}, mesh)["quantizer"]}
state = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, placed)
z = jax.ShapeDtypeStruct((N, C), jnp.float32, sharding=sharding.over_data(mesh))

def train(state, z, key):
    return module.apply(state, z, True, mutable=["batch_stats"], rngs={"codes": key})

step = jax.jit(train, donate_argnums=0, out_shardings=(None, placed))
memory = step.lower(state, z, jax.eval_shape(jax.random.key, 0)).compile().memory_analysis()
print(json.dumps({"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes}))
"""

# The same for the search on one device.
SEARCH = """
import json, sys
import jax, jax.numpy as jnp
from vqrae_jax.preflight import chips, programs
from vqrae_jax.quantizers.nearest import nearest

topology, N, K, C = sys.argv[1], *map(int, sys.argv[2:])
place = jax.sharding.SingleDeviceSharding(programs.abstract_devices(chips.parse_topology(topology))[0])
arguments = [jax.ShapeDtypeStruct((rows, C), jnp.float32, sharding=place) for rows in (N, K)]
memory = jax.jit(nearest).lower(*arguments).compile().memory_analysis()
print(json.dumps({"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes}))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not runtime.has_libtpu(), reason="libtpu is not installed (pip install libtpu)"),
]


def compile_for_tpu(program, *arguments):
    left_out = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    env = {name: value for name, value in os.environ.items() if name not in left_out}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=pathlib.Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("topology", "chips", "model"), [("v5e:4x4", 1, 1), ("v5e:4x4", 16, 4), ("v5p:2x2x4", 1, 1), ("v5p:2x2x4", 16, 4)]
)
def test_the_step_needs_little_memory_beyond_its_arguments(topology, chips, model):
    assert compile_for_tpu(STEP, topology, chips, model, 131_072, 16_384, 768)["temporaries"] < 64 * MIB


@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:2x2x4"])
def test_a_million_embeddings_fit_on_sixteen_chips(topology):
    memory = compile_for_tpu(STEP, topology, 16, 16, 131_072, 2**20, 768)
    assert memory["arguments"] < 1 * GIB
    assert sum(memory.values()) < HBM[topology[:3]] / 8


@pytest.mark.parametrize(("topology", "channels"), [("v5e:2x2", 32), ("v5e:2x2", 768), ("tpu7x:2x2x1", 768)])
def test_the_search_among_many_embeddings_needs_little_memory(topology, channels):
    assert compile_for_tpu(SEARCH, topology, 16_384, 2**17, channels)["temporaries"] < 256 * MIB
