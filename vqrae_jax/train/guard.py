"""Stops a run whose losses are no numbers any more, and says since when and which."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqrae_jax.checkpoint import Checkpoints
from vqrae_jax.errors import UserError
from vqrae_jax.train.task import Metrics

NEVER = np.iinfo(np.int32).max


class Guard:
    """Remembers on the device in which step each metric went bad first; `check` reads it, and waits for the device."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints
        self._first: Metrics = {}

    def add(self, step: int, metrics: Metrics, first_bad: Any) -> None:
        watched = {n: v for n, v in metrics.items() if n.startswith(("loss/", "gan/", "grad_norm"))}
        self._first = first_bad(self._first or {n: np.int32(NEVER) for n in watched}, watched, np.int32(step))

    def check(self) -> None:
        """Raises UserError before anything of a spoilt state is logged, evaluated or saved."""
        first = {n: int(step) for n, step in jax.device_get(self._first).items()}
        step = min(first.values(), default=NEVER)
        if step == NEVER:
            return
        terms = ", ".join(n for n in first if first[n] == step)
        self._checkpoints.wait()  # the last one may still be on its way to the disk
        good = self._checkpoints.steps[-1:]
        folder = self._checkpoints.folder
        going_on = "no checkpoint is complete. The same command begins anew"
        if good:
            going_on = f"the last good one is {folder / str(good[0])}. The same command goes on from there"
        raise UserError(
            f"step {step}: not finite any more: {terms}; {going_on}: give it a lower optimizer.learning_rate or a "
            "smaller weight of the term, or optimizer.clip_norm"
        )


def first_bad(first: Metrics, metrics: Metrics, step: jax.Array) -> Metrics:
    """For each metric the first step in which it was not finite."""
    return {n: jnp.where(jnp.isfinite(metrics[n]), first[n], jnp.minimum(first[n], step)) for n in first}
