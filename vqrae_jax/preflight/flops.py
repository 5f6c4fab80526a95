"""FLOPs of a step, counted from its traced program, so for whatever networks it has.

Every matrix product and convolution counts two operations per multiply-add, times the trips of the loops around it;
XLA's own cost analysis counts the body of a scan once. Element-wise work is left out: it is bound by memory. A loop
whose trips are not known before it runs (k-means on the first batch) counts as none.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval

PARTS = ("perceptual", "discriminator", "teacher", "encoder", "quantizer", "decoder")


@dataclasses.dataclass(frozen=True)
class Product:
    """One matrix product or convolution of the program.

    Attributes:
      part: the network it belongs to, one of PARTS or "other".
      backward: whether it is part of the backward pass (recomputation included).
      kind: "bfloat16", "default" or "highest" (float32, by precision).
      flops: of all devices together, all trips of the loops around it.
    """

    part: str
    backward: bool
    kind: str
    flops: float


def count(traced: ClosedJaxpr, platform: str) -> list[Product]:
    """The products of a program (`jax.jit(f).trace(...).jaxpr`), summed by what describes them.

    What no result needs is left out, as the compiler does: a gradient at one layer pulls back through all of them.

    Args:
      traced: the program.
      platform: "cpu", "gpu" or "tpu": of a switch between platforms its branch counts.
    """
    total: collections.Counter[tuple[str, bool, str]] = collections.Counter()
    needed, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    for stack, kind, flops in _products(needed, platform, "", 1.0):
        total[_part(stack), "transpose(" in stack, kind] += flops
    return [Product(*key, flops) for key, flops in sorted(total.items())]


def seconds(products: list[Product], chips: int, flops: float, passes: dict[str, float]) -> float:
    """Time of the products at `flops` per second and chip in bfloat16, evenly over the chips."""
    return sum(p.flops * passes.get(p.kind, 1) for p in products) / (chips * flops)


def _products(jaxpr: Jaxpr, platform: str, stack: str, trips: float) -> Iterator[tuple[str, str, float]]:
    for eqn in jaxpr.eqns:
        here = f"{stack}/{eqn.source_info.name_stack}"
        name = eqn.primitive.name
        if name == "dot_general":
            yield here, _kind(eqn), trips * _dot(eqn)
        elif name == "conv_general_dilated":
            yield here, _kind(eqn), trips * _convolution(eqn)
        elif name == "cond":  # of those that a value chooses, the dearest branch
            branches = [list(_products(b.jaxpr, platform, here, trips)) for b in _branches(eqn.params, platform)]
            yield from max(branches, key=lambda found: sum(flops for *_, flops in found))
        elif name != "while":
            inner = trips * _repeated(name, eqn.params)
            for body in _bodies(eqn.params):
                yield from _products(body, platform, here, inner)


def _branches(params: dict[str, Any], platform: str) -> Sequence[ClosedJaxpr]:
    """Those that can run on `platform`; a switch between platforms names them, None is any other."""
    names = params.get("branches_platforms")
    if names is None:
        return params["branches"]
    name = {"gpu": "cuda"}.get(platform, platform)
    return [next(b for b, group in zip(params["branches"], names, strict=True) if group is None or name in group)]


def _repeated(primitive: str, params: dict[str, Any]) -> int:
    """How often what a primitive holds is run."""
    if primitive == "scan":
        return params["length"]
    if primitive == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return params["mesh"].size if primitive == "shard_map" else 1  # every device runs it on its part


def _bodies(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value


def _dot(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)


def _convolution(eqn: Any) -> float:
    kernel, spec = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
    taps = math.prod(kernel[i] for i in spec[2:]) * kernel[spec[1]]  # spec[1]: input channels of one group
    # A transposed convolution multiplies zeros between the pixels that it spreads; those are not counted.
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * taps / math.prod(eqn.params["lhs_dilation"])


def _kind(eqn: Any) -> str:
    if all(v.aval.dtype.itemsize < 4 for v in eqn.invars[:2]):
        return "bfloat16"
    precision = str(eqn.params["precision"])  # of each side, or the name of an algorithm
    return "highest" if "HIGHEST" in precision or "F32_F32_F32" in precision else "default"


def _part(stack: str) -> str:
    words = set(re.findall(r"\w+", stack.lower()))
    names = ("lpips", "encoderdistance", "logitdistance")
    words |= {"perceptual"} if words & set(names) else set()
    words |= {"discriminator"} if words & {"dinodiscriminator", "patchdiscriminator"} else set()
    return next((part for part in PARTS if part in words), "other")
