"""The settings of samplers, as plain values."""

import dataclasses
import typing
from typing import Annotated, Literal

from vqrae_jax.errors import ConfigError
from vqrae_jax.generation.masking import Schedule

Method = Literal["confidence", "chance", "halton", "remask"]
GuidanceSchedule = Literal["constant", "linear", "power-cosine", "interval"]
LARGEST = 10**6


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """Settings of a sampler; "progress" is 0 in the first step, or for the first code, and 1 in the last.

    Masked diffusion has four methods. "confidence" reveals the most probable samples first, with noise that fades
    (MaskGIT, arXiv:2202.04200, section 3.2). "chance" reveals random positions: the reverse process of masked diffusion
    (arXiv:2406.07524), with the number of positions per step fixed, so that it is exact with one step per position (the
    first-hitting sampler, arXiv:2409.02908). "halton" reveals positions that are far apart (arXiv:2503.17076). "remask"
    is "chance" that hides sampled indices again, so that later steps correct them (ReMDM, arXiv:2503.00307), with fixed
    numbers as well; it is exact with (1 + remasking) steps per position.

    Raises:
      ConfigError: a value is not in its range.
    """

    method: Annotated[Method, "order in which codes of masked diffusion become visible"] = "confidence"
    steps: Annotated[
        int, "calls of a masked network, at least 1; at most one per position, except for the method remask"
    ] = 12
    schedule: Annotated[Schedule, "share of hidden codes after each step of masked diffusion"] = "cosine"
    temperature: Annotated[float, "divisor of the logits, above 0; lower values make probable codes more frequent"] = (
        1.0
    )
    last_temperature: Annotated[
        float | None, "temperature at the end, approached linearly; None: temperature everywhere"
    ] = None
    choice_temperature: Annotated[
        float, "scale of the noise of the method confidence, at least 0; higher values trade quality for variety"
    ] = 4.5
    remasking: Annotated[float, "how often the method remask hides a code again, on average, at most"] = 1.0
    top_k: Annotated[
        int | None, "number of most probable codes that autoregression samples from, and all as probable as the last"
    ] = None
    top_p: Annotated[
        float | None, "autoregression samples the most probable codes whose sum reaches it (Holtzman et al. 2020)"
    ] = None
    guidance: Annotated[
        float,
        "scale w of classifier-free guidance (arXiv:2207.12598), logits u + (1 + w) (c - u); 0 is the conditional "
        "distribution itself",
    ] = 0.0
    guidance_schedule: Annotated[
        GuidanceSchedule,
        "course of the guidance: constant; linear, from 0; power-cosine, guidance (1 - cos(pi progress^power)) / 2 "
        "(arXiv:2303.14389); or interval, zero outside of guidance_interval (arXiv:2404.07724)",
    ] = "constant"
    guidance_power: Annotated[float, "power of power-cosine, above 0; higher values guide later"] = 1.0
    guidance_interval: Annotated[
        tuple[float, float], "first and last progress with guidance in the schedule interval, in [0, 1]"
    ] = (0.0, 1.0)

    def __post_init__(self):
        for field, names in (("method", Method), ("schedule", Schedule), ("guidance_schedule", GuidanceSchedule)):
            self._check(field, getattr(self, field) in typing.get_args(names), f"one of {typing.get_args(names)}")
        for field in ("steps", "top_k"):
            value = getattr(self, field)
            self._check(field, value is None or 1 <= value <= LARGEST, "at least 1")
        for field in ("temperature", "last_temperature", "guidance_power"):
            value = getattr(self, field)
            self._check(field, value is None or 0 < value <= LARGEST, f"above 0 and at most {LARGEST:g}")
        for field in ("choice_temperature", "remasking", "guidance"):
            self._check(field, 0 <= getattr(self, field) <= LARGEST, f"from 0 to {LARGEST:g}")
        self._check("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1")
        first, last = self.guidance_interval
        self._check("guidance_interval", 0 <= first <= last <= 1, "two increasing numbers in [0, 1]")

    def _check(self, field: str, valid: bool, accepted: str) -> None:
        if not valid:
            raise ConfigError(f"must be {accepted}", field=field, value=getattr(self, field))
