"""The train state: everything that a training step changes."""

from typing import Any

import flax.struct


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
        """Returns the variables of the tokenizer: EMA parameters and the LIVE codebook.

        The PyTorch VQRAE saves EMA parameters with the codebook of initialization.
        """
        return {"params": self.ema_params, "batch_stats": self.batch_stats}

    def rest(self) -> dict[str, Any]:
        """Returns what only resuming needs."""
        rest = {"step": self.step, "params": self.params, "opt_state": self.opt_state}
        return {**rest, "adversary": self.adversary} if self.adversary else rest

    @classmethod
    def join(cls, inference: dict[str, Any], rest: dict[str, Any]) -> "TrainState":
        """Builds the state from the results of `inference` and `rest`."""
        return cls(ema_params=inference["params"], batch_stats=inference["batch_stats"], **rest)
