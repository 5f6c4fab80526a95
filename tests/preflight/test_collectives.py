"""Communication of the compiled training step: gradients and codebook statistics; with fsdp weights; no tokens."""

import dataclasses
import math

import jax
import pytest

from vqrae_jax.build.tokenizer import build_tokenizer
from vqrae_jax.preflight import hlo
from vqrae_jax.preflight.chips import parse_topology
from vqrae_jax.preflight.programs import Plan, build_mesh
from vqrae_jax.train.task import jit_step

IMAGES, TOKENS = 64, 16
SLACK = 1024  # bytes of scalars: metrics, norms, counters


def build_plan(tiny, **mesh):
    config = tiny(
        mesh=mesh, data={"batch_size": IMAGES}, model={"remat": True}, train={"trainable": ("quantizer", "decoder")}
    )
    return Plan.build(config, parse_topology("cpu:8"), build_mesh(config, jax.devices()[:8]))


def communicated_bytes(plan):
    """Returns the bytes by kind of collective; every collective must be along "data"."""
    program = jit_step(plan.task, plan.mesh).trace(*plan.train_arguments()).lower().compile()
    assert program.memory_analysis().argument_size_in_bytes == plan.argument_bytes()
    total = dict.fromkeys(hlo.COLLECTIVES, 0.0)
    for c in hlo.Program(program.as_text(), plan.mesh.size).collectives():
        assert hlo.mesh_axes(c, dict(plan.mesh.shape)) == ("data",)
        total[c.kind] += c.size * c.trips
    return total


def tree_bytes(tree):
    return sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def allowed_bytes(plan):
    """Returns bytes of (weights, gradients with codebook sums and counts, one float per token for revival)."""
    state = plan.task.shapes()
    statistics = tree_bytes([state.batch_stats["quantizer"][name] for name in ("sums", "counts")])
    weights = tree_bytes(state.params)
    return weights, weights + 2 * statistics + SLACK, 4 * IMAGES * TOKENS


def test_data_parallel_reduces_gradients_and_statistics_once(tiny):
    plan = build_plan(tiny)
    weights, reduced, per_token = allowed_bytes(plan)
    total = communicated_bytes(plan)
    fixed = tree_bytes(plan.task.shapes().params["decoder"]["pos_embed"])  # has no gradient
    assert weights - fixed <= total.pop("all-reduce") <= reduced
    assert total.pop("all-gather") <= per_token
    assert not any(total.values())
    # The bounds are tight enough to notice the tokens of one layer.
    assert reduced - (weights - fixed) + per_token < IMAGES * (TOKENS + 1) * 40 * 4


def check_fsdp(plan):
    """Weights are gathered for the forward and the backward pass, gradients reduced (on a CPU by all-reduce)."""
    total = communicated_bytes(plan)
    weights, reduced, per_token = allowed_bytes(plan)
    frozen = tree_bytes(plan.task.frozen_shapes())
    assert total["all-to-all"] == total["collective-permute"] == 0
    assert weights / 2 <= total["all-gather"] <= 2 * weights + frozen + per_token
    assert total["all-reduce"] + total["reduce-scatter"] <= reduced


@pytest.mark.slow
def test_fsdp_gathers_weights_and_reduces_gradients(tiny):
    check_fsdp(build_plan(tiny, fsdp=True, fsdp_min_size=1))


@pytest.mark.slow
def test_fsdp_without_sharding_constraints_moves_tokens(tiny):
    plan = build_plan(tiny, fsdp=True, fsdp_min_size=1)
    unconstrained = build_tokenizer(plan.config.model, weights=False)
    plan = dataclasses.replace(plan, task=dataclasses.replace(plan.task, built=unconstrained))
    with pytest.raises(AssertionError):
        check_fsdp(plan)
