"""FLOPs of a step, counted from its traced program, whatever networks it contains.

Matrix products and convolutions count two operations per multiply-add, times the iterations of the loops around them;
XLA's own cost analysis counts the body of a scan once. Element-wise operations, which memory bounds, do not count, nor
do loops whose length depends on data (k-means on the first batch).
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval

PARTS = ("generator", "perceptual", "discriminator", "teacher", "encoder", "quantizer", "decoder")
MODULES = {  # words of a name stack that belong to a part with another name
    "codetransformer": "generator",
    "lpips": "perceptual", "encoderdistance": "perceptual", "logitdistance": "perceptual",
    "dinodiscriminator": "discriminator", "patchdiscriminator": "discriminator",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Product:
    """Matrix products and convolutions of one kind in one part of the program."""

    part: str  # the network, one of PARTS or "other"
    backward: bool  # in the backward pass, which includes recomputation
    kind: str  # "bfloat16", or the precision of float32 products ("default", "high", "highest")
    flops: float  # over all devices, and all iterations of the loops around it


def count_products(traced: ClosedJaxpr, platform: str) -> list[Product]:
    """Counts the FLOPs of a program (`jax.jit(f).trace(...).jaxpr`) by part, pass and kind.

    Operations that no result needs do not count, because the compiler removes them; of a switch between platforms the
    branch of `platform` ("cpu", "gpu" or "tpu") counts.
    """
    total: collections.Counter[tuple[str, bool, str]] = collections.Counter()
    needed, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    for stack, kind, flops in _products(needed, platform, "", 1.0):
        total[_part(stack), "transpose(" in stack, kind] += flops
    return [Product(*key, flops) for key, flops in sorted(total.items())]


def _products(jaxpr: Jaxpr, platform: str, stack: str, trips: float) -> Iterator[tuple[str, str, float]]:
    """Yields (name stack, kind, FLOPs) of every product; `trips` is the number of iterations of the loops around it."""
    for eqn in jaxpr.eqns:
        name, inner_stack = eqn.primitive.name, f"{stack}/{eqn.source_info.name_stack}"
        if name == "dot_general":
            yield inner_stack, _kind(eqn), trips * _dot_flops(eqn)
        elif name == "conv_general_dilated":
            yield inner_stack, _kind(eqn), trips * _convolution_flops(eqn)
        elif name == "cond":  # the branch with the most FLOPs
            branches = [list(_products(b.jaxpr, platform, inner_stack, trips)) for b in _branches(eqn.params, platform)]
            yield from max(branches, key=lambda products: sum(flops for *_, flops in products))
        elif name != "while":
            repeats = eqn.params["length"] if name == "scan" else 1
            if name == "shard_map":  # every device runs the body on its part
                repeats = eqn.params["mesh"].size
            for value in eqn.params.values():
                if isinstance(value, ClosedJaxpr | Jaxpr):
                    body = value.jaxpr if isinstance(value, ClosedJaxpr) else value
                    yield from _products(body, platform, inner_stack, trips * repeats)


def _branches(params: dict[str, Any], platform: str) -> Sequence[ClosedJaxpr]:
    """Returns the branches that can run on `platform`; a switch between platforms names them, None for any other."""
    names = params.get("branches_platforms")
    if names is None:
        return params["branches"]
    name = {"gpu": "cuda"}.get(platform, platform)
    return [next(b for b, group in zip(params["branches"], names, strict=True) if group is None or name in group)]


def _dot_flops(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)


def _convolution_flops(eqn: Any) -> float:
    kernel, spec = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
    taps = math.prod(kernel[i] for i in spec[2:]) * kernel[spec[1]]  # spec[1]: input channels of one group
    # The zeros that a transposed convolution inserts between pixels do not count.
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * taps / math.prod(eqn.params["lhs_dilation"])


def _kind(eqn: Any) -> str:
    if all(v.aval.dtype.itemsize < 4 for v in eqn.invars[:2]):
        return "bfloat16"
    precision = str(eqn.params["precision"])  # of each side, or the name of an algorithm
    if "HIGHEST" in precision or "F32_F32_F32" in precision:
        return "highest"
    return "high" if "HIGH" in precision else "default"


def _part(stack: str) -> str:
    words = {MODULES.get(word, word) for word in re.findall(r"\w+", stack.lower())}
    return next((part for part in PARTS if part in words), "other")
