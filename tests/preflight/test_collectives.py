"""What the compiled training step sends: gradients and the codebook's statistics, with fsdp the weights; no tokens."""

import dataclasses
import math

import jax
import pytest

from vqrae_jax.build.tokenizer import build_tokenizer
from vqrae_jax.preflight import hlo
from vqrae_jax.preflight.chips import parse
from vqrae_jax.preflight.programs import Plan
from vqrae_jax.train.task import step_program

IMAGES, TOKENS = 64, 16
SLACK = 1024  # bytes of scalars: metrics, norms, counters


def plan(tiny, **mesh):
    config = tiny(
        mesh=mesh,
        data={"batch_size": IMAGES},
        model={"remat": True},
        train={"trainable": ("quantizer", "decoder")},
    )
    return Plan.make(config, parse("cpu:8"), jax.devices()[:8])


def sent(plan):
    """Bytes by kind; every collective must be along "data"."""
    program = step_program(plan.task, plan.mesh).trace(*plan.train_arguments()).lower().compile()
    assert program.memory_analysis().argument_size_in_bytes == plan.arguments()
    total = dict.fromkeys(hlo.COLLECTIVES, 0.0)
    for c in hlo.Program(program.as_text(), plan.mesh.size).collectives():
        assert hlo.axes(c, dict(plan.mesh.shape)) == ("data",)
        total[c.kind] += c.size * c.trips
    return total


def size(tree):
    return sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def allowed(plan):
    """(weights, what their gradients and the codebook's sums and counts need, one float per token for revival)."""
    state = plan.task.shapes()
    statistics = size([state.batch_stats["quantizer"][name] for name in ("sums", "counts")])
    return size(state.params), size(state.params) + 2 * statistics + SLACK, 4 * IMAGES * TOKENS


def test_data_parallel_reduces_gradients_and_statistics_once(tiny):
    found = plan(tiny)
    weights, reduced, per_token = allowed(found)
    total = sent(found)
    fixed = size(found.task.shapes().params["decoder"]["pos_embed"])  # has no gradient
    assert weights - fixed <= total.pop("all-reduce") <= reduced
    assert total.pop("all-gather") <= per_token
    assert not any(total.values())
    # The bound is tight enough to notice one layer's tokens.
    assert reduced - (weights - fixed) + per_token < IMAGES * (TOKENS + 1) * 40 * 4


def fsdp_bounds(total, found):
    """Weights are gathered for the forward and the backward pass, gradients reduced; on a CPU by all-reduce."""
    weights, reduced, per_token = allowed(found)
    frozen = size(found.task.frozen_shapes())
    assert total["all-to-all"] == total["collective-permute"] == 0
    assert weights / 2 <= total["all-gather"] <= 2 * weights + frozen + per_token
    assert total["all-reduce"] + total["reduce-scatter"] <= reduced


def test_fsdp_gathers_weights_and_reduces_gradients(tiny):
    found = plan(tiny, fsdp=True, fsdp_min_size=1)
    fsdp_bounds(sent(found), found)


@pytest.mark.slow
def test_tokens_that_move_are_noticed(tiny):
    """The same step where nothing says that tokens stay with their images."""
    found = plan(tiny, fsdp=True, fsdp_min_size=1)
    loose = build_tokenizer(found.config.model, weights=False)
    loose = dataclasses.replace(found, task=dataclasses.replace(found.task, built=loose))
    with pytest.raises(AssertionError):
        fsdp_bounds(sent(loose), loose)
