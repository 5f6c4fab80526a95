"""The settings of samplers of masked diffusion, as plain values."""

import dataclasses
import math
import typing
from typing import Literal

from vqrae_jax.errors import ConfigError
from vqrae_jax.generation.masking import Schedule

Method = Literal["confidence", "chance", "halton", "remask"]
GuidanceSchedule = Literal["constant", "linear", "power-cosine", "interval"]


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """Settings of `sampling.sample`.

    "Progress" is 0 in the first step and 1 in the last.

    Attributes:
      method: "confidence" reveals the most probable samples first, with noise that fades (MaskGIT, arXiv:2202.04200,
        section 3.2). "chance" reveals random positions: the reverse process of masked diffusion (arXiv:2406.07524),
        with the number of positions per step fixed, so that it is exact with one step per position (the first-hitting
        sampler, arXiv:2409.02908). "halton" reveals positions that are far apart (arXiv:2503.17076). "remask" is
        "chance" that hides sampled indices again, so that later steps correct them (ReMDM, arXiv:2503.00307), with
        fixed numbers as well. It is exact with (1 + remasking) steps per position.
      steps: calls of the network, at least 1. Methods other than "remask" use at most one step per position.
      schedule: share of hidden indices after each step.
      temperature: divisor of the logits, above 0; lower values make probable indices more frequent.
      last_temperature: temperature of the last step, approached linearly; None: `temperature` in all steps.
      choice_temperature: scale of the noise in "confidence", at least 0; higher values trade quality for variety.
      remasking: how often "remask" hides an index again, on average, at most; at least 0.
      guidance: scale w of classifier-free guidance (arXiv:2207.12598), logits u + (1 + w) (c - u), at least 0; 0 is the
        conditional distribution itself.
      guidance_schedule: "constant"; "linear" from 0 to `guidance`; "power-cosine", guidance (1 - cos(pi
        progress^power)) / 2 (arXiv:2303.14389); or "interval", `guidance` within `guidance_interval`, otherwise 0
        (arXiv:2404.07724).
      guidance_power: of "power-cosine", above 0; higher values guide later.
      guidance_interval: first and last progress with guidance, within [0, 1].

    Raises:
      ConfigError: a value is not in its range.
    """

    method: Method = "confidence"
    steps: int = 12
    schedule: Schedule = "cosine"
    temperature: float = 1.0
    last_temperature: float | None = None
    choice_temperature: float = 4.5
    remasking: float = 1.0
    guidance: float = 0.0
    guidance_schedule: GuidanceSchedule = "constant"
    guidance_power: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        for field, names in (("method", Method), ("schedule", Schedule), ("guidance_schedule", GuidanceSchedule)):
            self._check(field, getattr(self, field) in typing.get_args(names), f"one of {typing.get_args(names)}")
        self._check("steps", self.steps >= 1, "at least 1")
        for field in ("temperature", "last_temperature", "guidance_power"):
            value = getattr(self, field)
            self._check(field, value is None or 0 < value < math.inf, "finite and above 0")
        for field in ("choice_temperature", "remasking", "guidance"):
            self._check(field, 0 <= getattr(self, field) < math.inf, "finite and at least 0")
        first, last = self.guidance_interval
        self._check("guidance_interval", 0 <= first <= last <= 1, "two increasing numbers in [0, 1]")

    def _check(self, field: str, valid: bool, accepted: str) -> None:
        if not valid:
            raise ConfigError(f"must be {accepted}", field=field, value=getattr(self, field))
