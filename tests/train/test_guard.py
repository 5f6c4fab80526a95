"""A run that has diverged stops, says when and by what, and leaves its checkpoints good."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax import checkpoint
from vqrae_jax.errors import UserError
from vqrae_jax.train import loop
from vqrae_jax.train.guard import Guard, first_bad


def test_the_first_bad_step_and_its_terms_are_named(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    guard, watch = Guard(checkpoints), jax.jit(first_bad)
    guard.check()  # nothing yet
    for step, bad in ((1, ()), (2, ()), (3, ("loss/vq", "grad_norm")), (4, ("loss/vq", "loss/pixel"))):
        names = ("loss/vq", "loss/pixel", "grad_norm")
        metrics = {n: jnp.asarray(np.nan if n in bad else 1.0) for n in names}
        guard.add(step, {**metrics, "counts": jnp.zeros(4), "codebook/dead": jnp.asarray(np.nan)}, watch)
        if step == 2:
            guard.check()
    told = (
        r"step 3: not finite any more: grad_norm, loss/vq; no checkpoint is complete\. The same command begins anew: "
    )
    with pytest.raises(UserError, match=told):
        guard.check()
    checkpoints.save(2, {"a": jnp.zeros(1)}, {"b": jnp.zeros(1)}, {}, {})
    with pytest.raises(UserError, match=r"is .*checkpoints/2\. The same command goes on from there: give it a lower"):
        guard.check()
    checkpoints.close()


@pytest.mark.slow
def test_a_diverging_run_stops_before_it_saves(tiny, tmp_path, one_device):
    """The rate is finite for a step and far too large after it."""
    mad = {"learning_rate": 1e37, "schedule": "constant", "warmup_steps": 0, "clip_norm": 0.0}
    config = tiny(optimizer=mad, train={"log_every": 3, "checkpoint_every": 1, "evaluate_every": 100})
    with pytest.raises(UserError, match=rf"step 2: .*loss/pixel.*the last good one is {tmp_path}.*/1\."):
        loop.train(config, tmp_path, one_device)
    assert checkpoint.completed_steps(tmp_path / "checkpoints") == [1]
