"""Folders here and in buckets behind one kind of path, and the few things in which they differ.

An object in a bucket appears whole under its name or not at all; nothing is added to it, and a folder is no more than
how names begin. `at` gives pathlib's path for a folder here and etils' for an address, which reads and writes through
fsspec.
"""

import contextlib
import hashlib
import logging
import os
import pathlib
import tempfile
import time
import uuid
from collections.abc import Iterator
from typing import Any

from vqrae_jax.errors import StorageError

log = logging.getLogger(__name__)

Path = Any  # pathlib.Path or etils.epath.Path: what `at` gives

CACHE = pathlib.Path("~/.cache/vqrae_jax/files")


def is_remote(path: str | os.PathLike) -> bool:
    """Whether `path` is an address, as in gs://bucket/folder."""
    return "://" in os.fspath(path)


def at(path: str | os.PathLike) -> Path:
    """`path` as an object with pathlib's methods: absolute, or the address gs://bucket/...

    Raises:
      StorageError: another kind of address, or a package that reading it needs is missing.
    """
    if not is_remote(path):
        return pathlib.Path(path).expanduser().absolute()
    if not os.fspath(path).startswith("gs://"):
        raise StorageError(f"{os.fspath(path)}: runs and weights are kept in folders and in gs:// buckets only")
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        raise StorageError(f"{os.fspath(path)} needs gcsfs: pip install 'vqrae-jax[gcs]'") from None
    os.environ.setdefault("EPATH_USE_TF", "false")  # where TensorFlow is installed, etils would load it
    from etils import epath

    return epath.Path(path)


@contextlib.contextmanager
def told(path: str | os.PathLike, doing: str) -> Iterator[None]:
    """What a bucket refuses becomes a StorageError; errors of folders here stay what they are.

    Args:
      path: what is used.
      doing: "read" or "written".
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:  # gcsfs and its network library have many
        if not is_remote(path):
            raise
        reason = next((line for line in str(error).splitlines() if line.strip()), "no reason given")[:200]
        raise StorageError(
            f"{os.fspath(path)} cannot be {doing} ({type(error).__name__}: {reason}): check the name of the bucket and "
            "that the account of this machine may use it: the role Storage Object Admin on the bucket, and the scope "
            "cloud-platform on the machine or `gcloud auth application-default login`"
        ) from error


@contextlib.contextmanager
def called(path: pathlib.Path) -> Iterator[None]:
    """An error of the temporary file that becomes `path` is told of `path`: nobody has asked for the other."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error  # becomes the same kind


def write(path: str | os.PathLike, content: bytes) -> None:
    """The file appears under its name only when it is complete; missing folders are made.

    Raises:
      OSError, StorageError: refused; an earlier file of that name is still there.
    """
    path = at(path)
    if is_remote(path):
        with told(path, "written"):
            path.write_bytes(content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that the replacement is atomic; of a name that no writer on any machine has.
    temporary = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    with called(path):
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def share(path: pathlib.Path) -> None:
    """Gives a file here the rights that the umask, or the folder's own rules, give a new one.

    Libraries that write by way of a temporary file leave it readable to its owner alone, which colleagues on a cluster
    notice.
    """
    ordinary = path.with_name(f".{uuid.uuid4().hex}")  # made to look at: the umask can be asked only by changing it
    try:
        ordinary.touch()
        mode = ordinary.stat().st_mode
    finally:
        ordinary.unlink(missing_ok=True)
    if path.stat().st_mode != mode:
        path.chmod(mode & 0o777)


@contextlib.contextmanager
def staged(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """`path` itself if it is here, else a place here whose file, or files, are copied to that address at the end.

    Raises:
      StorageError: the bucket may not be written.
    """
    target = at(path)
    if not is_remote(target):
        yield target
        return
    with tempfile.TemporaryDirectory(prefix="vqrae_jax-") as scratch:
        place = pathlib.Path(scratch) / target.name
        yield place
        if place.is_file():
            write(target, place.read_bytes())
        for file in sorted(p for p in place.rglob("*") if p.is_file()):
            write(target / file.relative_to(place).as_posix(), file.read_bytes())


def fetch(path: str | os.PathLike) -> pathlib.Path:
    """`path` itself if it is here, else a copy of that file, or of the files of that folder, made once.

    A copy has the time of its original, not its own, so that no clock but the bucket's decides whether it is still one;
    it is asked before the content, which may be replaced meanwhile. What is not there is not there in the copy either.

    Raises:
      StorageError: it may not be read.
    """
    source = at(path)
    if not is_remote(source):
        return source
    place = CACHE.expanduser() / hashlib.sha256(os.fspath(source).encode()).hexdigest()[:16] / source.name
    with told(source, "read"):
        files = {place / file.name: file for file in source.iterdir()} if source.is_dir() else {place: source}
        for copy, file in files.items():
            if not file.is_file():
                continue
            there = file.stat()
            if not copy.is_file() or (copy.stat().st_size, copy.stat().st_mtime) != (there.length, there.mtime):
                write(copy, file.read_bytes())
                os.utime(copy, (there.mtime, there.mtime))
    for copy in place.iterdir() if place.is_dir() else ():
        if copy not in files and not copy.name.startswith("."):  # those are being written
            copy.unlink(missing_ok=True)
    return place


class Mirror:
    """A folder here to keep logs in, which are added to; one in a bucket gets copies of its files.

    Attributes:
      folder: `target` itself if it is a folder here, else a temporary one.
    """

    def __init__(self, target: Path):
        self._target, self._scratch = target, None
        self.folder = target
        self._copied: dict[pathlib.Path, tuple[int, int]] = {}
        self._last = time.monotonic()
        if is_remote(target):
            self._scratch = tempfile.TemporaryDirectory(prefix="vqrae_jax-")
            self.folder = pathlib.Path(self._scratch.name)

    def take(self, name: str) -> None:
        """Takes over what an earlier run has written under `name`, to add to it."""
        if self._scratch and (self._target / name).is_file():
            (self.folder / name).write_bytes((self._target / name).read_bytes())

    def copy(self, seconds: float = 0.0) -> None:
        """Copies files that have changed, unless that was done in the last `seconds`; what fails is tried again."""
        if self._scratch is None or time.monotonic() - self._last < seconds:
            return
        self._last = time.monotonic()
        for file in sorted(p for p in self.folder.rglob("*") if p.is_file()):
            state = file.stat().st_size, file.stat().st_mtime_ns
            if self._copied.get(file) == state:
                continue
            try:
                write(self._target / file.relative_to(self.folder).as_posix(), file.read_bytes())
                self._copied[file] = state
            except StorageError as error:  # the run is worth more than its log
                log.warning("%s; tried again later", error)
                return

    def close(self) -> None:
        self.copy()
        if self._scratch:
            self._scratch.cleanup()
