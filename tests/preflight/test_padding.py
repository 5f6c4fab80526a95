"""Padding of products on a TPU, from lines that libtpu's compiler wrote and from a program that it compiles here."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from vqrae_jax.preflight import hlo, padding
from vqrae_jax.preflight.devices import has_libtpu

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """ENTRY %main (a: bf16[1]) -> bf16[1] {{
  %a = bf16[{left}]{{2,1,0}} parameter(0)
  %b = bf16[{right}]{{2,1,0}} parameter(1)
  ROOT %c = bf16[{out}]{{{layout}}} convolution(%a, %b), window={{{window}}}, dim_labels={labels}
}}
"""


def product(left, right, out, layout, window, labels):
    text = PROGRAM.format(left=left, right=right, out=out, layout=layout, window=window, labels=labels)
    (found,) = padding.products(hlo.Program(text, 1), 128)
    return found


def test_tokens_in_lanes():
    """A query of ViT-XL: 257 tokens lie in rows of 384."""
    found = product("4,257,1152,1", "1152,16,72,1", "4,257,16,72", "1,3,2,0:T(8,128)(2,1)",
                    "size=1x16 pad=0_0x15_15 rhs_reversal=0x1", "0bf1_i1o0->0b1f")  # fmt: skip
    assert found.flops == 2 * 4 * 257 * 1152 * 1152
    assert found.padding == pytest.approx(384 / 257 - 1)


def test_tokens_that_are_contracted():
    """The gradient of a kernel: 4 x 257 tokens are cut into pieces of 128."""
    found = product("4,257,4096", "4,257,1152", "4096,1152,1", "1,0,2:T(8,128)(2,1)", "size=4", "0fb_0io->bf0")
    assert found.flops == 2 * 4 * 257 * 4096 * 1152
    assert found.padding == pytest.approx(9 * 128 / 1028 - 1)


def test_what_runs_in_parallel_is_not_multiplied():
    """Scores of 4 x 16 heads, which libtpu writes as a window of 4 x 16 with stride and gaps."""
    found = product("4,16,257,72", "4,16,257,72", "4,16,257,257", "3,2,1,0:T(8,128)",
                    "size=4x16 stride=3x15 lhs_dilate=4x16", "01bf_01oi->01bf")  # fmt: skip
    assert found.flops == 2 * 4 * 16 * 257 * 257 * 72
    assert found.padding == pytest.approx(128 / 72 * 264 / 257 * 384 / 257 - 1)


def test_float32_counts_its_passes():
    found = [padding.Product("", "", 1.0, 0.5, True), padding.Product("", "", 1.0, 0.0, False)]
    assert padding.total(found, passes=3) == pytest.approx(3 * 0.5 / 4)
    assert padding.large([*found, padding.Product("", "", 0.001, 9.0, False)])[0][0] == pytest.approx(1 / 2.001)


COMPILE = """
import json
import jax, jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from vqrae_jax.preflight import hlo, padding
from vqrae_jax.preflight.chips import parse
from vqrae_jax.preflight.devices import abstract_devices
from vqrae_jax.preflight.programs import compile_and_print

topology = parse("v5e:1x1")
everywhere = NamedSharding(Mesh(np.array(abstract_devices(topology)), "d"), P())
x, up, down = (
    jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=everywhere) for shape in ((1024, 256), (256, 1024), (1024, 256))
)

def loss(up, down, x):
    return jnp.sum(jnp.tanh(jnp.tanh(x @ up) @ down), dtype=jnp.float32)

_, text = compile_and_print(jax.jit(jax.grad(loss, (0, 1))).trace(up, down, x), topology)
found = padding.products(hlo.Program(text, 1), topology.chip.side)
print(json.dumps({"flops": sum(p.flops for p in found), "padding": padding.total(found, 6.0)}))
"""


@pytest.mark.skipif(not has_libtpu(), reason="compiles for a TPU")
def test_a_compiled_program():
    """Two matrices' products forward and their gradients, in full tiles: FLOPs as counted by hand, no padding."""
    left_out = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "JAX_PLATFORMS")
    env = {name: value for name, value in os.environ.items() if name not in left_out}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"flops": 5 * 2 * 1024 * 256 * 1024, "padding": 0}
