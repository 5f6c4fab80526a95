"""Attention as a Pallas kernel for TPUs, which takes tokens as the projections make them, [B, N, K * d].

Left to XLA, the N x N weights go through the chip's main memory, and the tokens of queries, keys and values lie in
lanes, 257 of 384, so that a third of the three projections' products is padding. Here a program holds some heads of one
picture whole in fast memory, as FlashAttention does (Dao et al. 2022, arXiv:2205.14135) without its tiles: of the 200
to 1,000 tokens of an image all keys fit. The gradient computes the weights again. Compiled for v4 to v6e, interpreted
in tests, not run on a TPU yet. On other devices, and for sizes that do not fit, it is `attention.attend`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vqrae_jax.models.attention import Heads
from vqrae_jax.models.attention import attend as attend_xla

LANES = 128
FAST_MEMORY = 16 * 2**20  # bytes that a program may take of it on every TPU without asking for more

PerDevice = Callable[[Callable[..., Any]], Callable[..., Any]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def attend(
    query: Heads, key: Heads, value: Heads, per_device: PerDevice, precision: jax.lax.Precision | None = None
) -> Heads:
    """As `attention.attend`; `per_device` makes a function run on every device with its part of B and K."""
    return per_device(functools.partial(_forward, precision=precision))(query, key, value)


def _saving(
    query: Heads, key: Heads, value: Heads, per_device: PerDevice, precision: jax.lax.Precision | None
) -> tuple[Heads, tuple[Heads, Heads, Heads]]:
    return attend(query, key, value, per_device, precision), (query, key, value)


def _pulling_back(
    per_device: PerDevice, precision: jax.lax.Precision | None, saved: tuple[Heads, Heads, Heads], gradient: Heads
) -> tuple[Heads, Heads, Heads]:
    return per_device(functools.partial(_backward, precision=precision))(*saved, gradient)


attend.defvjp(_saving, _pulling_back)


def _forward(query: Heads, key: Heads, value: Heads, precision: jax.lax.Precision | None) -> Heads:
    def plain(*inputs: Heads) -> Heads:
        return attend_xla(*inputs, precision)

    def kernel(*inputs: Heads) -> Heads:
        return run(mix, inputs, 1, precision)[0]

    chosen = kernel if fits(query, 4) else plain
    return jax.lax.platform_dependent(query, key, value, tpu=chosen, default=plain)


def _backward(
    query: Heads, key: Heads, value: Heads, gradient: Heads, precision: jax.lax.Precision | None
) -> tuple[Heads, Heads, Heads]:
    def plain(*inputs: Heads) -> tuple[Heads, ...]:
        *saved, gradient = inputs
        return jax.vjp(functools.partial(attend_xla, precision=precision), *saved)[1](gradient)

    def kernel(*inputs: Heads) -> tuple[Heads, ...]:
        return tuple(run(pull_back, inputs, 3, precision))

    chosen = kernel if fits(query, 7) else plain
    return jax.lax.platform_dependent(query, key, value, gradient, tpu=chosen, default=plain)


def fits(x: Heads, arrays: int) -> bool:
    """Whether a program has room for its blocks, each twice while the next are fetched, and every head's weights."""
    _, tokens, heads, width = x.shape
    group = _group(heads, width)
    return 2 * arrays * tokens * group * width * x.dtype.itemsize + 4 * group * tokens**2 <= FAST_MEMORY


def run(
    kernel: Callable[..., None],
    inputs: tuple[Heads, ...],
    outputs: int,
    precision: jax.lax.Precision | None = None,
    interpret: bool = False,
) -> list[Heads]:
    """`mix` or `pull_back` over all pictures, a few heads at a time; interpreted, slowly, on any device."""
    batch, tokens, heads, width = inputs[0].shape
    group = _group(heads, width)
    block = pl.BlockSpec((1, tokens, group * width), lambda picture, part: (picture, 0, part))
    flat = jax.ShapeDtypeStruct((batch, tokens, heads * width), inputs[0].dtype)
    products = 2 if outputs == 1 else 5
    found = pl.pallas_call(
        functools.partial(kernel, width=width, precision=precision),
        grid=(batch, heads // group),
        in_specs=[block] * len(inputs),
        out_specs=[block] * outputs,
        out_shape=[flat] * outputs,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=products * 2 * batch * heads * tokens**2 * width,
            transcendentals=batch * heads * tokens**2,
            bytes_accessed=(len(inputs) + outputs) * flat.size * flat.dtype.itemsize,
        ),
        interpret=interpret,
        name=f"attention_{kernel.__name__}",
    )(*(x.reshape(flat.shape) for x in inputs))
    return [x.reshape(inputs[0].shape) for x in found]


def mix(query: Any, key: Any, value: Any, mixed: Any, *, width: int, precision: jax.lax.Precision | None) -> None:
    """The kernel of the forward pass: blocks [1, N, k * d] of a few heads."""
    product = functools.partial(_product, precision=precision)
    for head in _heads(query, width):
        scores = product(query[0, :, head], key[0, :, head], 1, 1)
        weights = jnp.exp((scores - scores.max(1, keepdims=True)) * width**-0.5)
        total = product(weights.astype(value.dtype), value[0, :, head], 1, 0)
        mixed[0, :, head] = (total * (1 / weights.sum(1, keepdims=True))).astype(mixed.dtype)


def pull_back(
    query: Any, key: Any, value: Any, gradient: Any, to_query: Any, to_key: Any, to_value: Any,
    *, width: int, precision: jax.lax.Precision | None,
) -> None:  # fmt: skip
    """The kernel of the gradient, from the forward pass's inputs.

    Scores stand transposed, keys by queries: sums over keys then add whole registers, and two of the three products
    need no transposition.
    """
    product = functools.partial(_product, precision=precision)
    for head in _heads(query, width):
        q, k, v, g = (x[0, :, head] for x in (query, key, value, gradient))
        scores = product(k, q, 1, 1)
        weights = jnp.exp((scores - scores.max(0, keepdims=True)) * width**-0.5)
        weights = weights * (1 / weights.sum(0, keepdims=True))
        slope = product(v, g, 1, 1)
        slope = weights * (slope - (weights * slope).sum(0, keepdims=True)) * width**-0.5
        slope = slope.astype(q.dtype)
        to_value[0, :, head] = product(weights.astype(g.dtype), g, 1, 0).astype(to_value.dtype)
        to_key[0, :, head] = product(slope, q, 1, 0).astype(to_key.dtype)
        to_query[0, :, head] = product(slope, k, 0, 0).astype(to_query.dtype)


def _product(left: jax.Array, right: jax.Array, i: int, j: int, precision: jax.lax.Precision | None) -> jax.Array:
    """Sums over axis i of `left` and axis j of `right`, in float32."""
    return jax.lax.dot_general(
        left, right, (((i,), (j,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _heads(block: Any, width: int) -> list[slice]:
    return [slice(start, start + width) for start in range(0, block.shape[-1], width)]


def _group(heads: int, width: int) -> int:
    """Heads of one program: the fewest that fill whole lanes, or all."""
    return next((n for n in range(1, heads) if heads % n == 0 and n * width % LANES == 0), heads)
