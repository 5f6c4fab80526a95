"""The wish to stop: a signal here, or the notice that some machine of the run is about to be taken away."""

import signal
import threading
from types import FrameType, TracebackType

from jax.experimental import multihost_utils

from vqrae_jax import distributed


class Stopped(Exception):
    """The run ended early, as it was asked to, with everything saved. Not an error."""

    def __init__(self, step: int):
        self.step = step
        super().__init__(f"stopped at step {step}, which is saved")


class StopSignal:
    """SIGTERM and Ctrl-C become a question that the loop asks between steps; a second Ctrl-C interrupts as ever.

    Where JAX runs several processes it holds SIGTERM itself: it tells the others and finds a step that all can reach.
    """

    def __init__(self):
        self._asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread() and not distributed.is_connected():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self, step: int) -> bool:
        """Whether to save `step` and stop; the same answer in every process. To be asked at every step."""
        return self._asked or multihost_utils.reached_preemption_sync_point(step)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
