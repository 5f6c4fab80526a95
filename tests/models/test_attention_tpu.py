"""The kernel compiled for TPUs that are not here: one chip and a mesh, forward and back, with little padding."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from vqrae_jax.preflight.devices import has_libtpu

ROOT = pathlib.Path(__file__).parents[2]
# A process of its own: jax must not have started, and libtpu serves one process.
PROGRAM = """
import json, sys
from vqrae_jax.preflight import chips, devices, hlo, padding, programs
topology = chips.parse(sys.argv[1])
found = devices.abstract_devices(topology)

import flax.linen as nn, jax, jax.numpy as jnp
from vqrae_jax import sharding
from vqrae_jax.build.encoder import activation_spread
from vqrae_jax.models.vit import BlocksConfig, run_blocks

mesh = sharding.make_mesh(-1, int(sys.argv[2]), found)
spread = activation_spread(mesh)

class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return run_blocks(BlocksConfig(*map(int, sys.argv[4:8]), scan=True, dtype="bfloat16", attention="pallas",
                                       spread=spread), x)[0]

x = jax.ShapeDtypeStruct((8 * mesh.shape["data"], int(sys.argv[3]), int(sys.argv[4])), jnp.bfloat16,
                         sharding=sharding.over_data(mesh))
params = jax.eval_shape(Net().init, jax.random.key(0), x)
params = jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), params,
                      sharding.shardings(params, mesh))
slope = jax.jit(jax.grad(lambda p, x: Net().apply(p, x).astype(jnp.float32).sum(), argnums=(0, 1)))
_, text = programs.compile_and_print(slope.trace(params, x), topology)
program = hlo.Program(text, mesh.size)
kernels = [op.shape.split("{")[0] for _, op, _ in program.executed(True) if "tpu_custom_call" in op.attributes]
waste = padding.total(padding.products(program, topology.chip.side), topology.chip.passes["highest"])
print(json.dumps({"kernels": sorted(kernels), "padding": waste}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not has_libtpu(), reason="libtpu is not installed (pip install libtpu)")
@pytest.mark.parametrize(
    ("topology", "model", "tokens", "width", "heads", "part"),
    [
        ("v5e:1x1", 1, 257, 768, 12, "bf16[8,257,768]"),
        ("v5e:2x2", 2, 257, 768, 12, "bf16[8,257,384]"),  # six of twelve heads on each device
        ("v5p:2x2x1", 1, 257, 1152, 16, "bf16[8,257,1152]"),  # heads of 72 channels
        ("v4:2x2x1", 1, 785, 384, 6, "bf16[8,785,384]"),
        ("v6e:2x2", 1, 1025, 768, 12, "bf16[8,1025,768]"),
    ],
)
def test_kernels_compile(topology, model, tokens, width, heads, part):
    arguments = [topology, model, tokens, width, 1, heads, 4 * width]
    env = {n: v for n, v in os.environ.items() if not n.startswith(("XLA_", "JAX_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, env=env
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kernels"] == [f"({part}", part]  # three gradients, and the forward pass
    assert found["padding"] < 0.1
