"""What the loop knows of a task; the tokenizer and the generator differ by one file."""

from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from vqrae_jax import runtime, sharding
from vqrae_jax.train.state import TrainState

# Scalars [], averaged over a logging window, and integers (events, and "counts" [..., K] of the codes), summed over it.
Metrics = dict[str, Any]


def is_sum(metric: Any) -> bool:
    """Whether a metric is added up instead of averaged."""
    return bool(np.issubdtype(metric.dtype, np.integer))


class Task(Protocol):
    """A thing to train."""

    @property
    def codebook_size(self) -> int | None:
        """K; None where there are no codes."""

    def shapes(self) -> TrainState:
        """The state as jax.ShapeDtypeStruct with shardings; nothing is computed."""

    def init(self) -> TrainState:
        """The state before the first step, every leaf created where it will live."""

    def frozen(self) -> Any:
        """Networks that the step reads and nothing changes."""

    def frozen_shapes(self) -> Any:
        """`frozen` as jax.ShapeDtypeStruct with shardings; nothing is read or computed."""

    def step(self, state: TrainState, frozen: Any, batch: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
        """One optimizer step; pure."""

    def evaluate_batch(self, variables: Any, frozen: Any, batch: dict[str, jax.Array]) -> Metrics:
        """What is measured of images [B]; pure.

        "counts" [..., K], how often each code was chosen for the images whose "mask" is True; and rows [B, ...]:
        "reconstruction" [B, H, W, 3], "code" (one vector per image) and any scores.
        """

    def codebook(self, state: TrainState, frozen: Any) -> Metrics:
        """What the state tells of the codebook, for the log; empty where there is none; pure."""

    def pictures(self, variables: Any, frozen: Any, batch: dict[str, jax.Array]) -> Any:
        """Arrays from which `draw` makes a picture; pure."""

    def draw(self, arrays: Any) -> np.ndarray:
        """uint8 [H, W, 3]."""


def step_program(task: Task, mesh: Mesh) -> Any:
    """The jitted step: the state is given up, and its successor lives where it lived."""
    where = jax.tree.map(lambda x: x.sharding, task.shapes())
    return jax.jit(
        task.step, donate_argnums=0, out_shardings=(where, sharding.replicated(mesh)),
        compiler_options=runtime.compiler_options(mesh.devices.flat[0].platform),
    )  # fmt: skip
