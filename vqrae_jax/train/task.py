"""The interface between the training loop and what it trains: state, metrics and task."""

from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from vqrae_jax import runtime, sharding

# Scalars [], averaged over a logging window, and integers (events, and "counts" [..., K] of the indices), summed.
Metrics = dict[str, Any]
Batch = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """One pytree, donated from step to step. Frozen networks are not part of it."""

    step: Any  # int32 []: number of optimizer steps done
    params: dict[str, Any]  # the subtrees that train
    ema_params: dict[str, Any]  # their moving average, and the subtrees from train.start_from that do not train
    batch_stats: dict[str, Any]  # mutable collections: codebook and its statistics
    opt_state: Any
    # params, opt_state, spectral (power iteration) and lecam (moving averages) of the discriminator; empty without one
    adversary: dict[str, Any] = flax.struct.field(default_factory=dict)

    def inference(self) -> dict[str, Any]:
        """Returns the variables of the model: EMA parameters and the LIVE batch_stats."""
        return {"params": self.ema_params, "batch_stats": self.batch_stats}

    def rest(self) -> dict[str, Any]:
        """Returns what only resuming needs."""
        rest = {"step": self.step, "params": self.params, "opt_state": self.opt_state}
        return {**rest, "adversary": self.adversary} if self.adversary else rest

    @classmethod
    def join(cls, inference: dict[str, Any], rest: dict[str, Any]) -> "TrainState":
        """Builds the state from the results of `inference` and `rest`."""
        return cls(ema_params=inference["params"], batch_stats=inference["batch_stats"], **rest)

    @classmethod
    def of_model(cls, inference: dict[str, Any], step: int = 0) -> "TrainState":
        """Builds a state without what only training needs."""
        return cls.join(inference, {"step": jnp.asarray(step), "params": {}, "opt_state": ()})


def is_sum(metric: Any) -> bool:
    return bool(np.issubdtype(metric.dtype, np.integer))


@runtime_checkable
class Task(Protocol):
    """A model with its training step, evaluation and images for the log.

    Attributes:
      inputs: names of the arrays of a batch that the step reads.
      pictures: name of the images for the log.
    """

    inputs: tuple[str, ...]
    pictures: str

    def shapes(self) -> TrainState:
        """Returns the train state as jax.ShapeDtypeStruct with shardings."""

    def init(self) -> TrainState:
        """Returns the train state of step 0, every leaf created on its devices."""

    def frozen(self) -> Any:
        """Returns the networks that a step reads and nothing changes."""

    def frozen_shapes(self) -> Any:
        """Returns the frozen networks as jax.ShapeDtypeStruct with shardings."""

    def step(self, state: TrainState, frozen: Any, batch: Batch, horizon: jax.Array) -> tuple[TrainState, Metrics]:
        """Takes one optimizer step; `horizon` is the int32 number of steps of the run, with which schedules end."""

    def evaluate(self, variables: Any, frozen: Any, batch: Batch) -> Metrics:
        """Measures a batch, of which `mask` [B] marks padding by False, and `index` [B] are the numbers of the images.

        Returns rows [B, ...]: any scores, and of a tokenizer "reconstruction" [B, H, W, 3] and "code" (a vector per
        image), with "counts" [..., K] of the indices without padding.
        """

    def log_metrics(self, state: TrainState, frozen: Any) -> Metrics:
        """Returns metrics of the state that are too expensive for every step."""

    def score(self, metrics: dict[str, int | float]) -> float | None:
        """Returns the quality by which the best checkpoints are kept, from metrics of the validation images."""

    def sample_images(self, variables: Any, frozen: Any, batch: Batch) -> UInt8[np.ndarray, "H W 3"] | None:
        """Returns a picture for the log of the first images of a batch, if there is one; every process calls it."""


def jit_step(task: Task, mesh: Mesh) -> Any:
    """Returns the compiled step; it donates the state, and the new state has the same shardings."""
    shardings = jax.tree.map(lambda x: x.sharding, task.shapes())
    return jax.jit(
        task.step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)),
        compiler_options=runtime.compiler_options(mesh.devices.flat[0].platform),
    )  # fmt: skip


def place_horizon(steps: int, mesh: Mesh) -> jax.Array:
    return sharding.place_array(np.asarray(steps, np.int32), sharding.replicated(mesh))
