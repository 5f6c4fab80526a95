"""Several processes as one run: how they connect, agree before anything long starts, and end.

Arrays and the training step do not depend on it: a pod is one program over global arrays. The functions below pass
short texts through the service with which JAX connects processes. A collective would not do: it needs programs that
agree already, and waits forever for a process that has ended.
"""

import atexit
import hashlib
import io
import itertools
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

from vqrae_jax import peers, runtime
from vqrae_jax.errors import ConfigError, DistributedError, UserError, first_line

log = logging.getLogger(__name__)

T = TypeVar("T")

CONNECT_TIMEOUT = 300  # seconds until all processes must have connected
EXCHANGE_TIMEOUT = 1800  # seconds that the fastest process waits for the slowest, which may be reading weights

_exchanges = itertools.count()
_peers: peers.Peers | None = None
_single = False  # `connect` found nothing to connect: this is the only process, whatever index a launcher gave it


def connect(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    timeout: float = CONNECT_TIMEOUT,
) -> None:
    """Connects the processes of a run. Call it before anything else uses a device.

    From then on, the end of one process ends the others within seconds, with one message and exit code 1. If process 0
    is killed, JAX may notice it first, and aborts the others with a message and stack traces of its own.

    Args:
      coordinator: host:port of process 0. JAX finds what is None by itself on TPU pods, under SLURM, Open MPI and in
        Kubernetes jobs. If all three are None and it finds nothing, this is the only process.
      processes: number of processes; 1 connects nothing.
      process: index of this process, from 0.
      timeout: seconds until all processes must have connected; after that this process exits with code 1.

    Raises:
      ConfigError: the three do not fit together.
      DistributedError: the port is in use.
    """
    import jax

    global _single
    if processes is not None and processes < 1:
        raise ConfigError("must be at least 1", field="--processes", value=processes)
    if process is not None and not 0 <= process < (processes or process + 1):
        limit = f"from 0 to {processes - 1} (--processes={processes})" if processes else "at least 0"
        raise ConfigError(f"process indices are {limit}", field="--process", value=process)
    if processes == 1:
        _single = True
        return
    if coordinator is not None:
        _check_coordinator(coordinator, process == 0)
    # JAX would abort with a stack trace of its own: this thread exits first, with one sentence.
    timer = threading.Timer(timeout, _exit_unconnected, (timeout,))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(coordinator, processes, process, initialization_timeout=int(timeout) + 60)
    except (ValueError, TypeError) as error:
        no_cluster = (coordinator, processes, process) == (None,) * 3 and "coordinator_address" in str(error)
        if not no_cluster:
            raise ConfigError(
                f"--coordinator={coordinator} --processes={processes} --process={process} do not fit together "
                f"({error}); give all three, or none where TPU, SLURM or Open MPI define them"
            ) from None
        _single = True
    except RuntimeError as error:
        raise DistributedError(f"the processes of this run cannot connect: {error}") from error
    finally:
        timer.cancel()
    if is_connected():
        _watch_peers()


def is_connected() -> bool:
    """Returns whether `connect` connected several processes."""
    return _state().client is not None


def process_count() -> int:
    """Returns the number of processes of this run."""
    return _state().num_processes if is_connected() else 1


def process_index() -> int:
    """Returns the index of this process; before `connect`, the one that the command line or the launcher gives it."""
    if is_connected():
        return _state().process_id
    if _single:
        return 0
    flags = (argument.split("=", 1)[1] for argument in sys.argv if re.match(r"--?process=\d+$", argument))
    return int(next(flags, runtime.launcher_process() or 0))


def exchange(text: str, timeout: float = EXCHANGE_TIMEOUT) -> list[str]:
    """Returns the texts of all processes, by process index. All processes call it, equally often.

    Raises:
      DistributedError: a process did not call it within `timeout` seconds, or process 0 has another --processes.
    """
    if process_count() == 1:
        return [text]
    client, folder = _state().client, f"vqrae_jax/{next(_exchanges)}"
    try:
        client.key_value_set(f"{folder}/{process_index()}", text)
        client.wait_at_barrier(f"{folder}/all", int(timeout * 1000))
        texts = {int(name.rsplit("/", 1)[1]): value for name, value in client.key_value_dir_get(folder)}
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise DistributedError(f"not every process answered within {timeout:.0f} s ({reason})") from error
    if len(texts) != process_count():
        message = f"process 0 was started with {len(texts)}; all processes need the same number"
        raise DistributedError(message, field="--processes", value=process_count(), exit_code=2)
    return [texts[i] for i in range(process_count())]


def iterate_arrays(arrays: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """Yields the arrays of every process, by process index; all processes iterate to the end.

    Arrays are sent by a collective, bit for bit, so all processes must be at the same point of one program. Only the
    arrays of one process are in memory at a time.
    """
    if process_count() == 1:
        yield arrays
        return
    from jax.experimental.multihost_utils import broadcast_one_to_all

    file = io.BytesIO()
    np.savez(file, **arrays)
    for i, length in enumerate(exchange(str(file.tell()))):
        is_source = i == process_index()
        content = np.frombuffer(file.getvalue(), np.uint8) if is_source else np.zeros(int(length), np.uint8)
        with np.load(io.BytesIO(np.asarray(broadcast_one_to_all(content, is_source)).tobytes())) as received:
            yield dict(received)


def run_together(action: Callable[[], T]) -> T:
    """Returns the result of `action()`, which every process calls; if it fails in one, it fails in all.

    Raises:
      DistributedError: with the indices of the processes that failed and their messages. With one process, the error
        itself.
    """
    if process_count() == 1:
        return action()
    result, error = None, None
    try:
        result = action()
    except Exception as raised:
        error = raised
    messages = exchange("" if error is None else (str(error) or type(error).__name__))
    if not any(messages):
        return result
    exit_code = error.exit_code if isinstance(error, UserError) else None
    raise DistributedError(_join_messages(messages), exit_code=exit_code) from error


def check_equal(
    values: dict[str, Any], remedy: str = "start all of them with the same config and the same packages",
    exit_code: int | None = None,
) -> None:  # fmt: skip
    """Checks that every process has the same values.

    Args:
      values: names and JSON-able values, sections nested.
      remedy: what the user should do about differences.
      exit_code: of the error; 2 for differences that remain at another attempt.

    Raises:
      DistributedError: with the names that differ and the values of each process.
    """
    text = json.dumps(values, sort_keys=True, default=str)
    if len(set(exchange(hashlib.sha256(text.encode()).hexdigest()))) == 1:
        return
    from flax.traverse_util import flatten_dict

    first, *rest = [flatten_dict(json.loads(text), keep_empty_nodes=True, sep=".") for text in exchange(text)]
    lines = [f"the processes do not agree; {remedy}:"]
    for i, other in enumerate(rest, 1):
        lines += [
            f"  {name}: process 0 has {first.get(name)!r}, process {i} has {other.get(name)!r}"
            for name in sorted(first.keys() | other.keys())
            if first.get(name) != other.get(name)
        ]
    raise DistributedError("\n".join(lines), exit_code=exit_code)


def wait_for_loss(seconds: float) -> None:
    """Waits whether another process ends, which makes collectives fail; this process then ends with a message."""
    if _peers and _peers.wait_for_loss(seconds):
        threading.Event().wait()


def exit_process(code: int) -> None:
    """Ends this process, one of several, at once: a normal exit would wait for processes that wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    if process_index() == 0:
        time.sleep(1)  # the other processes leave first: to them the end of process 0 is an error of its own
    os._exit(code)


def _state() -> Any:
    """Returns JAX's distributed state; its public interface has neither the service nor, without devices, the index."""
    from jax._src.distributed import global_state

    return global_state


def _check_coordinator(coordinator: str, is_first: bool) -> None:
    """Checks the address, and in process 0 that its port is free: JAX shares a port with other runs, then aborts."""
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        message = "expected host:port of process 0, as in 10.0.0.1:1234"
        raise ConfigError(message, field="--coordinator", value=coordinator)
    if is_first:
        try:
            peers.open_server(int(port)).close()
        except OSError as error:
            message = f"process 0 cannot open the port ({os.strerror(error.errno)}); choose another in all processes"
            raise DistributedError(message, field="--coordinator", value=coordinator) from None


def _watch_peers() -> None:
    """Ends this process when another one ends; usually sooner than JAX, which aborts with stack traces."""
    global _peers
    state = _state()
    host = state.coordinator_address.rpartition(":")[0].strip("[]")
    try:
        _peers = peers.Peers(state.process_id, state.client, host, _exit_after_loss)
    except (OSError, RuntimeError) as error:
        log.warning("no connection to process 0 (%s); JAX notices the end of a process after 100 s", first_line(error))
    else:
        atexit.register(_peers.close)


def _exit_after_loss(name: str) -> None:
    index = process_index()
    try:
        sys.stderr.write(
            f"error{f' (process {index})' if index else ''}: {name} has ended; the cause is in its own output or, if it"
            " was killed, in the log of its machine. Start all processes again with the same command: a run resumes "
            "from its newest checkpoint\n"
        )
    finally:
        os._exit(DistributedError.exit_code)


def _exit_unconnected(timeout: float) -> None:
    state = _state()
    print(
        f"error: process {state.process_id} is still alone after {timeout:.0f} s (coordinator "
        f"{state.coordinator_address or 'unknown'}): check that all processes were started, that --processes is their "
        "number and that they reach the coordinator's host and port; --start_timeout sets a longer wait",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(1)


def _join_messages(messages: list[str]) -> str:
    """Returns each message once, with the indices of its processes; a message of all processes alone."""
    indices: dict[str, list[int]] = {}
    for i, text in enumerate(messages):
        if text:
            indices.setdefault(text, []).append(i)
    if len(indices) == 1 and len(indices[next(iter(indices))]) == len(messages):
        return messages[0]
    return "\n".join(f"process {', '.join(map(str, which))}: {text}" for text, which in indices.items())
