"""What training changes, and what it reads."""

from typing import Any

import flax.struct


@flax.struct.dataclass
class TrainState:
    """One pytree, donated from step to step. Frozen networks are not in it."""

    step: Any  # Int32 []: optimizer steps done
    params: dict[str, Any]  # the subtrees that train
    ema_params: dict[str, Any]  # their running mean, and what another run gave and does not train
    batch_stats: dict[str, Any]  # mutable collections: codebook and its statistics
    opt_state: Any
    # params, opt_state, spectral (power iteration) and lecam (running means) of the discriminator; empty without one
    adversary: dict[str, Any] = flax.struct.field(default_factory=dict)

    def inference(self) -> dict[str, Any]:
        """What a tokenizer is made of: EMA parameters and the LIVE codebook.

        The origin averages parameters and forgets the codebook, so it ships the random one it started with.
        """
        return {"params": self.ema_params, "batch_stats": self.batch_stats}

    def rest(self) -> dict[str, Any]:
        """What only resuming needs."""
        rest = {"step": self.step, "params": self.params, "opt_state": self.opt_state}
        return {**rest, "adversary": self.adversary} if self.adversary else rest

    @classmethod
    def join(cls, inference: dict[str, Any], rest: dict[str, Any]) -> "TrainState":
        """The inverse of the two."""
        return cls(ema_params=inference["params"], batch_stats=inference["batch_stats"], **rest)
