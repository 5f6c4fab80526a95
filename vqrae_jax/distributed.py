"""Several processes as one run: how they start, agree before anything long begins, and end.

Arrays and the step know nothing of it: a pod is one program over global arrays. What is here passes short texts by the
service with which JAX starts processes. A collective would not do: it needs programs that agree already, and waits
without end for a process that is gone.
"""

import hashlib
import io
import itertools
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from vqrae_jax.errors import ConfigError, DistributedError

T = TypeVar("T")

START_TIMEOUT = 300  # seconds until all processes are there
AGREE_TIMEOUT = 1800  # seconds that the fastest waits for the slowest, which may be reading weights
# Where launchers write the number of a process.
RANKS = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "TPU_WORKER_ID", "CLOUD_TPU_TASK_ID", "JOB_COMPLETION_INDEX")

_exchanges = itertools.count()
_alone = False  # `start` has connected nothing: this process is all there is, whatever number a launcher gave it


def connect(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    timeout: float = START_TIMEOUT,
) -> None:
    """Connects the processes of a run; before anything else touches a device.

    Args:
      coordinator: host:port of process 0. What is None is found by JAX itself on TPU pods, under SLURM, Open MPI and
        Kubernetes jobs. Where it finds nothing and nothing is given, this process is all there is and nothing starts.
      processes: how many; 1 starts nothing.
      process: the number of this one, from 0.
      timeout: seconds until all must be there; after that this process says so and exits with code 1.

    Raises:
      ConfigError: the three do not fit together.
      DistributedError: the port is taken.
    """
    import jax

    global _alone
    if processes is not None and processes < 1:
        raise ConfigError(f"--processes={processes}: there is at least 1")
    if process is not None and not 0 <= process < (processes or process + 1):
        last = f" to {processes - 1} of --processes={processes}" if processes else ""
        raise ConfigError(f"--process={process}: processes have the numbers from 0{last}")
    if processes == 1:
        _alone = True
        return
    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        raise ConfigError(f"--coordinator={coordinator!r} is no host:port of process 0, as in 10.0.0.1:1234")
    # JAX would abort with a stack of its own; this thread speaks first.
    timer = threading.Timer(timeout, _give_up, (timeout,))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(coordinator, processes, process, initialization_timeout=int(timeout) + 60)
    except (ValueError, TypeError) as error:
        found_nothing = (coordinator, processes, process) == (None,) * 3 and "coordinator_address" in str(error)
        if not found_nothing:
            raise ConfigError(
                f"--coordinator={coordinator} --processes={processes} --process={process}: {error} Give all three, "
                "or none where TPU, SLURM or Open MPI say them"
            ) from None
        _alone = True
    except RuntimeError as error:
        raise DistributedError(f"the processes of this run cannot be connected: {error}") from error
    finally:
        timer.cancel()


def is_connected() -> bool:
    """Whether `start` connected anything."""
    return _runtime().client is not None


def process_count() -> int:
    return _runtime().num_processes if is_connected() else 1


def process_index() -> int:
    """The number of this process; before `start` that which the command line or the launcher gives it."""
    if is_connected():
        return _runtime().process_id
    if _alone:
        return 0
    given = [a.split("=", 1)[1] for a in sys.argv if re.match(r"--?process=\d+$", a)]
    given += [os.environ[name] for name in RANKS if os.environ.get(name, "").isdigit()]
    return int(given[0]) if given else 0


def exchange(text: str, timeout: float = AGREE_TIMEOUT) -> list[str]:
    """What every process says, by process number. All processes call it, equally often.

    Raises:
      DistributedError: one did not come within `timeout` seconds.
    """
    if process_count() == 1:
        return [text]
    client, folder = _runtime().client, f"vqrae_jax/{next(_exchanges)}"
    try:
        client.key_value_set(f"{folder}/{process_index()}", text)
        client.wait_at_barrier(f"{folder}/all", int(timeout * 1000))
        said = {int(name.rsplit("/", 1)[1]): value for name, value in client.key_value_dir_get(folder)}
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise DistributedError(f"not every process answered within {timeout:.0f} s ({reason})") from error
    return [said[i] for i in range(process_count())]


def iterate_arrays(arrays: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """The arrays of every process, by process number; all processes iterate, to the end.

    They cross by a collective, bit for bit, hence only where the processes are at the same point of one program. One
    process's are in memory at a time.
    """
    if process_count() == 1:
        yield arrays
        return
    from jax.experimental.multihost_utils import broadcast_one_to_all

    file = io.BytesIO()
    np.savez(file, **arrays)
    for i, length in enumerate(exchange(str(file.tell()))):
        speaks = i == process_index()
        given = np.frombuffer(file.getvalue(), np.uint8) if speaks else np.zeros(int(length), np.uint8)
        with np.load(io.BytesIO(np.asarray(broadcast_one_to_all(given, speaks)).tobytes())) as told:
            yield dict(told)


def run_together(action: Callable[[], T]) -> T:
    """The result of `action()`, which every process runs; if it fails on one, it fails on all.

    Raises:
      DistributedError: naming the processes that failed and what each of them says. With one process, or for what is
        no message to a user, the error itself.
    """
    if process_count() == 1:
        return action()
    result, error = None, None
    try:
        result = action()
    except Exception as raised:
        error = raised
    said = exchange("" if error is None else (str(error) or type(error).__name__))
    if not any(said):
        return result
    raise DistributedError(_by_process(said)) from error


def check_equal(
    mine: dict[str, Any], remedy: str = "start all of them with the same config and the same packages"
) -> None:
    """Nothing, if every process has the same values.

    Args:
      mine: names and JSON-able values, sections nested.
      remedy: what to do about differences.

    Raises:
      DistributedError: naming what differs, and which process has which value.
    """
    text = json.dumps(mine, sort_keys=True, default=str)
    if len(set(exchange(hashlib.sha256(text.encode()).hexdigest()))) == 1:
        return
    first, *others = [dict(_flat(json.loads(said))) for said in exchange(text)]
    lines = [f"the processes do not agree; {remedy}:"]
    for i, other in enumerate(others, 1):
        lines += [
            f"  {name}: process 0 has {first.get(name)!r}, process {i} has {other.get(name)!r}"
            for name in sorted(first.keys() | other.keys())
            if first.get(name) != other.get(name)
        ]
    raise DistributedError("\n".join(lines))


def exit_process(code: int) -> None:
    """Ends this process of several at once: the usual end would wait for processes that wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    if process_index() == 0:
        time.sleep(1)  # the others leave first: to them the end of process 0 is an error of its own
    os._exit(code)


def _runtime() -> Any:
    """What `jax.distributed` knows; its public face has neither the process number without devices nor the service."""
    from jax._src.distributed import global_state

    return global_state


def _give_up(timeout: float) -> None:
    state = _runtime()
    where = state.coordinator_address or "not found yet"
    print(
        f"error: process {state.process_id} is still alone after {timeout:.0f} s (coordinator {where}): are all "
        "processes started, is --processes their number, and can they reach the coordinator's host and port? "
        "--start_timeout gives them longer",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(1)


def _by_process(said: Sequence[str]) -> str:
    """Each message once, with the processes that say it."""
    speakers: dict[str, list[int]] = {}
    for i, text in enumerate(said):
        if text:
            speakers.setdefault(text, []).append(i)
    if list(speakers.values()) == [list(range(len(said)))]:
        return said[0]
    return "\n".join(f"process {', '.join(map(str, who))}: {text}" for text, who in speakers.items())


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    return [
        pair
        for name, value in values.items()
        for pair in (_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)])
    ]
