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
from jaxtyping import Array, Float

from vqrae_jax.models.attention import attend as attend_xla

LANES = 128
FAST_MEMORY = 16 * 2**20  # bytes that a program may take of it on every TPU without asking for more

Flat = Float[Array, "B N K*d"]
PerDevice = Callable[[Callable[..., Any], int], Callable[..., Any]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def attend(
    query: Flat, key: Flat, value: Flat, width: int, per_device: PerDevice, precision: jax.lax.Precision | None = None
) -> Flat:
    """As `attention.attend`, of heads of `width` side by side; `per_device` is that of `vit.Spread`."""
    return per_device(functools.partial(_forward, width=width, precision=precision), width)(query, key, value)


def _saving(
    query: Flat, key: Flat, value: Flat, width: int, per_device: PerDevice, precision: jax.lax.Precision | None
) -> tuple[Flat, tuple[Flat, Flat, Flat]]:
    return attend(query, key, value, width, per_device, precision), (query, key, value)


def _pulling_back(
    width: int, per_device: PerDevice, precision: jax.lax.Precision | None, saved: tuple[Flat, Flat, Flat], slope: Flat
) -> tuple[Flat, Flat, Flat]:
    return per_device(functools.partial(_backward, width=width, precision=precision), width)(*saved, slope)


attend.defvjp(_saving, _pulling_back)


def _forward(query: Flat, key: Flat, value: Flat, width: int, precision: jax.lax.Precision | None) -> Flat:
    plain = functools.partial(_plain, width=width, precision=precision)

    def kernel(*inputs: Flat) -> Flat:
        return run(mix, inputs, 1, width, precision)[0]

    chosen = kernel if fits(query, width, 4) else plain
    return jax.lax.platform_dependent(query, key, value, tpu=chosen, default=plain)


def _backward(
    query: Flat, key: Flat, value: Flat, slope: Flat, width: int, precision: jax.lax.Precision | None
) -> tuple[Flat, Flat, Flat]:
    def plain(*inputs: Flat) -> tuple[Flat, ...]:
        *saved, slope = inputs
        return jax.vjp(functools.partial(_plain, width=width, precision=precision), *saved)[1](slope)

    def kernel(*inputs: Flat) -> tuple[Flat, ...]:
        return tuple(run(pull_back, inputs, 3, width, precision))

    chosen = kernel if fits(query, width, 7) else plain
    return jax.lax.platform_dependent(query, key, value, slope, tpu=chosen, default=plain)


def _plain(*inputs: Flat, width: int, precision: jax.lax.Precision | None) -> Flat:
    heads = (x.reshape(*x.shape[:2], -1, width) for x in inputs)
    return attend_xla(*heads, precision).reshape(inputs[0].shape)


def fits(x: Flat, width: int, arrays: int) -> bool:
    """Whether a program has room for its blocks, each twice while the next are fetched, and every head's weights."""
    _, tokens, channels = x.shape
    group = _group(channels // width, width)
    return 2 * arrays * tokens * group * width * x.dtype.itemsize + 4 * group * tokens**2 <= FAST_MEMORY


def run(
    kernel: Callable[..., None],
    inputs: tuple[Flat, ...],
    outputs: int,
    width: int,
    precision: jax.lax.Precision | None = None,
    interpret: bool = False,
) -> list[Flat]:
    """`mix` or `pull_back` over all pictures, a few heads at a time; interpreted, slowly, on any device."""
    batch, tokens, channels = inputs[0].shape
    group = _group(channels // width, width) * width
    block = pl.BlockSpec((1, tokens, group), lambda picture, part: (picture, 0, part))
    products = 2 if outputs == 1 else 5
    return pl.pallas_call(
        functools.partial(kernel, width=width, precision=precision),
        grid=(batch, channels // group),
        in_specs=[block] * len(inputs),
        out_specs=[block] * outputs,
        out_shape=[jax.ShapeDtypeStruct(inputs[0].shape, inputs[0].dtype)] * outputs,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=products * 2 * batch * tokens**2 * channels,
            transcendentals=batch * tokens**2 * channels // width,
            bytes_accessed=(len(inputs) + outputs) * inputs[0].size * inputs[0].dtype.itemsize,
        ),
        interpret=interpret,
        name=f"attention_{kernel.__name__}",
    )(*inputs)


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
