"""The interface between the training loop and what it trains."""

from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from vqrae_jax import runtime, sharding
from vqrae_jax.train.state import TrainState

# Scalars [], averaged over a logging window, and integers (events, and "counts" [..., K] of the indices), summed.
Metrics = dict[str, Any]


def is_sum(metric: Any) -> bool:
    """Returns whether a metric is summed over a window instead of averaged."""
    return bool(np.issubdtype(metric.dtype, np.integer))


@runtime_checkable
class Task(Protocol):
    """A model with its training step, evaluation and images for the log. Only `sample_images` is impure."""

    def shapes(self) -> TrainState:
        """Returns the train state as jax.ShapeDtypeStruct with shardings."""

    def init(self) -> TrainState:
        """Returns the train state of step 0, every leaf created on its devices."""

    def frozen(self) -> Any:
        """Returns the networks that a step reads and nothing changes."""

    def frozen_shapes(self) -> Any:
        """Returns the frozen networks as jax.ShapeDtypeStruct with shardings."""

    def step(
        self, state: TrainState, frozen: Any, batch: dict[str, jax.Array], horizon: jax.Array
    ) -> tuple[TrainState, Metrics]:
        """Takes one optimizer step; `horizon` is the int32 number of steps of the run, with which schedules end."""

    def evaluate(self, variables: Any, frozen: Any, batch: dict[str, jax.Array]) -> Metrics:
        """Measures a batch of images, of which `mask` [B] marks padding by False.

        Returns "counts" [..., K], how often each index was chosen except in padding, and rows [B, ...]:
        "reconstruction" [B, H, W, 3], "code" (a vector per image) and any scores.
        """

    def log_metrics(self, state: TrainState, frozen: Any) -> Metrics:
        """Returns metrics of the state that are too expensive for every step."""

    def sample_images(self, variables: Any, frozen: Any, batch: dict[str, jax.Array]) -> UInt8[np.ndarray, "H W 3"]:
        """Returns a picture for the log, computed from the first images of a batch; every process calls it."""


def jit_step(task: Task, mesh: Mesh) -> Any:
    """Returns the compiled step; it donates the state, and the new state has the same shardings."""
    shardings = jax.tree.map(lambda x: x.sharding, task.shapes())
    return jax.jit(
        task.step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)),
        compiler_options=runtime.compiler_options(mesh.devices.flat[0].platform),
    )  # fmt: skip


def place_horizon(steps: int, mesh: Mesh) -> jax.Array:
    """Returns the `horizon` of a step."""
    return sharding.place_array(np.asarray(steps, np.int32), sharding.replicated(mesh))
