"""Stopping a run early: a signal in this process, or a preemption notice for any machine of the run."""

import signal
import threading
from types import FrameType

from jax.experimental import multihost_utils

from vqrae_jax import distributed


class Stopped(Exception):
    """The run stopped early on request, with everything saved. Not an error."""

    def __init__(self, step: int):
        self.step = step
        super().__init__(f"stopped at step {step}, which is saved")


class StopSignal:
    """A context in which SIGTERM and Ctrl-C only set a flag that the loop reads; a second Ctrl-C interrupts as usual.

    With several processes JAX handles SIGTERM: it notifies all of them and agrees on a step that all can reach.
    """

    def __init__(self):
        self._received = False
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread() and not distributed.is_connected():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> bool:
        """Returns whether to save `step` and stop, the same in every process. Call it after every step."""
        return self._received or multihost_utils.reached_preemption_sync_point(step)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
