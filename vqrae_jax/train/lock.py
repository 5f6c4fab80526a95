"""The lock of a workdir: two runs there would delete each other's checkpoints.

The lock is a file that names its run and is rewritten every ten seconds. A run on another machine has ended if its lock
does not change while it is watched; clocks are not compared, as they differ between machines and can go back.
"""

import contextlib
import datetime
import json
import logging
import os
import pathlib
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from vqrae_jax import storage
from vqrae_jax.errors import CheckpointError, StorageError

log = logging.getLogger(__name__)

FILE = "run.lock"
REFRESH_SECONDS = 10.0
WATCH_SECONDS = 30.0
SETTLE_SECONDS = 1.0  # longer than two runs that replace the same lock at once can be apart


@contextlib.contextmanager
def lock_workdir(workdir: storage.Path) -> Iterator[None]:
    """Locks a workdir; raises CheckpointError with host, process and start of another run that has locked it."""
    path, now = workdir / FILE, datetime.datetime.now().astimezone()
    owner = _machine() | {"pid": os.getpid(), "started": _start_time(os.getpid()), "run": uuid.uuid4().hex}
    owner["since"] = now.isoformat(timespec="seconds")
    _acquire(path, owner)
    stop = threading.Event()
    thread = threading.Thread(target=_refresh, args=(path, owner, stop), daemon=True, name="workdir_lock")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        with contextlib.suppress(OSError, StorageError), storage.convert_errors(path, "written"):
            if _is_owner(path, owner):
                path.unlink()


def _acquire(path: storage.Path, owner: dict[str, Any]) -> None:
    content = json.dumps(owner | {"count": 0}).encode()
    while not storage.create_file(path, content):
        holder = _read(path)
        if holder is not None and _is_running(path, holder):
            run = f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
            raise CheckpointError(
                f"another run uses this workdir ({run}); stop it or choose another workdir", field="--workdir",
                value=os.fspath(path.parent),
            )  # fmt: skip
        if holder is not None and _read(path) == holder:
            log.warning("removing %s of process %s on %s, which has ended", path, holder.get("pid"), holder.get("host"))
            path.unlink(missing_ok=True)
            if storage.create_file(path, content):
                time.sleep(SETTLE_SECONDS)
                if _is_owner(path, owner):
                    return


def _is_running(path: storage.Path, holder: dict[str, Any]) -> bool:
    machine = _machine()
    if machine["boot"] and machine.items() <= holder.items():
        return _start_time(holder.get("pid")) == holder.get("started")
    log.info("%s is of a run on %s: watching it for %.0f s", path, holder.get("host"), WATCH_SECONDS)
    deadline = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < deadline:
        time.sleep(WATCH_SECONDS / 15)
        if (current := _read(path)) != holder:
            return current is not None
    return False


def _refresh(path: storage.Path, owner: dict[str, Any], stop: threading.Event) -> None:
    count = 0
    while not stop.wait(REFRESH_SECONDS):
        try:
            if not _is_owner(path, owner):
                log.error("%s belongs to another run now; stop one of the two", path)
                return
            count += 1
            storage.write_bytes(path, json.dumps(owner | {"count": count}).encode())
        except (OSError, StorageError) as error:
            log.warning("%s is not refreshed: %s", path, error)


def _is_owner(path: storage.Path, owner: dict[str, Any]) -> bool:
    """Returns whether no other run has the lock."""
    return (_read(path) or owner).get("run") == owner["run"]


def _read(path: storage.Path) -> dict[str, Any] | None:
    """Returns the content of a lock, empty while it is being written; None if it does not exist."""
    try:
        content = json.loads(storage.read_bytes(os.fspath(path)))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _machine() -> dict[str, str]:
    """Returns what identifies a machine: host, boot and, as containers may share both, the namespace of process ids."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return {"host": platform.node(), "boot": boot, "namespace": os.readlink("/proc/self/ns/pid")}
    except OSError:  # not Linux
        return {"host": platform.node(), "boot": "", "namespace": ""}


def _start_time(pid: Any) -> str | None:
    """Returns when a process of this machine started, as a later one may get its number; None: it does not exist."""
    try:
        state, *values = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else values[18]
