"""Log lines about long work: how much is done, and how long the rest takes."""

import datetime
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

SECONDS = (10.0, 60.0)  # between lines of `progress`: at first, and at most


class Pace:
    """Estimates the remaining time from the pace after the first result, which may include a compilation."""

    def __init__(self, total: int):
        self._total, self._first, self._start = total, 0, None

    def describe(self, done: int) -> str:
        """Returns the remaining time as ", ETA 1:23:45"; "" while it is unknown."""
        now = time.monotonic()
        if self._start is None:
            self._first, self._start = done, now
        if done <= self._first or done >= self._total:
            return ""
        seconds = (now - self._start) / (done - self._first) * (self._total - done)
        return f", ETA {datetime.timedelta(seconds=round(seconds))}"


def progress(items: Iterable[T], total: int, unit: str, size: Callable[[T], int] = lambda _: 1) -> Iterator[T]:
    """Yields `items`, and logs now and then how much is done; `total` is the sum of their sizes, in `unit`s."""
    pace, done, start = Pace(total), 0, time.monotonic()
    last = start
    for item in items:
        yield item
        done += size(item)
        eta, now = pace.describe(done), time.monotonic()
        if now - last >= min(max((now - start) / 6, SECONDS[0]), SECONDS[1]) and done < total:
            last = now
            log.info("%s of %s %s%s", f"{done:,}", f"{total:,}", unit, eta)
