import re

import pytest

from vqrae_jax import progress as progress_lines
from vqrae_jax.progress import Pace, progress


@pytest.fixture
def clock(monkeypatch):
    """A list with the current time, which the module reads."""
    now = [100.0]
    monkeypatch.setattr(progress_lines.time, "monotonic", lambda: now[0])
    return now


def test_pace_leaves_out_the_first_result_which_compiles(clock):
    pace = Pace(41)
    assert pace.describe(1) == ""
    clock[0] += 20
    assert pace.describe(11) == ", ETA 0:01:00"
    assert pace.describe(41) == ""


def test_progress_yields_everything_and_logs_now_and_then(clock, caplog):
    """Ten items in the first ten seconds, then one in ten seconds, for an hour."""
    items = []
    with caplog.at_level("INFO"):
        for item in progress(iter(range(370)), 3700, "images", lambda _: 10):
            items.append(item)
            clock[0] += 1 if item < 10 else 10
    assert items == list(range(370))
    lines = [record.getMessage() for record in caplog.records]
    assert all(re.fullmatch(r"[\d,]+ of 3,700 images, ETA \d:\d\d:\d\d", line) for line in lines)
    assert 60 <= len(lines) <= 70  # at least once a minute, and rarely otherwise
