"""Local and remote files: the only module that opens, lists or copies remote paths.

Runs, weights and codes are in local folders and gs:// buckets, behind the methods of pathlib (`resolve_path`); errors
of buckets are StorageErrors. Datasets are read from every address that fsspec supports. Nothing can be appended to an
object in a bucket, and a folder is only a common prefix of names.
"""

import contextlib
import errno
import functools
import hashlib
import io
import logging
import os
import pathlib
import stat
import tempfile
import time
import uuid
import zipfile
from collections.abc import Iterator
from typing import Any

from vqrae_jax import runtime
from vqrae_jax.errors import ConfigError, DataError, StorageError, first_line

log = logging.getLogger(__name__)

_UNPACKED, _RATIO = 2**30, 20  # an archive may unpack to this number of bytes or to this multiple of its size
_UNUSABLE = {  # errors of single files
    errno.EACCES, errno.EFBIG, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENODEV, errno.ENOENT,
    errno.ENOTDIR, errno.ENXIO, errno.EPERM,
}  # fmt: skip

Path = Any  # pathlib.Path or etils.epath.Path, as returned by `resolve_path`

_CHECK_ACCESS = (
    "check the name of the bucket and that the account of this machine has access (gs://: the role Storage Object "
    "Admin, and the scope cloud-platform of the machine or `gcloud auth application-default login`)"
)


def is_remote(path: str | os.PathLike) -> bool:
    """Returns whether `path` is an address such as gs://bucket/folder."""
    return "://" in os.fspath(path)


def check_path(path: Any, field: str) -> None:
    """Raises ConfigError for anything but text and paths, such as None."""
    if not isinstance(path, str | os.PathLike):
        raise ConfigError("expected a path, an address or a hub id", field=field, value=path)


def expand_home(path: str | os.PathLike) -> str:
    """Returns a path as text, with the home folder in place of a leading ~."""
    return os.path.expanduser(os.fspath(path))


def resolve_path(path: str | os.PathLike) -> Path:
    """Returns an absolute local path, or the path object of a gs:// address; both have pathlib's methods."""
    if not is_remote(path):
        return pathlib.Path(expand_home(path)).absolute()
    if not os.fspath(path).startswith("gs://") or not os.fspath(path)[5:].strip("/"):
        raise StorageError("runs, weights and codes must be in local folders or gs:// buckets", field=os.fspath(path))
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        raise StorageError("gs:// needs gcsfs: pip install 'vqrae-jax[gcs]'", field=os.fspath(path)) from None
    runtime.set_environment(EPATH_USE_TF="false")  # where TensorFlow is installed, etils would load it
    from etils import epath

    return epath.Path(path)


@contextlib.contextmanager
def convert_errors(path: str | os.PathLike, action: str) -> Iterator[None]:
    """Converts every error of a remote path to a StorageError; `action` ("read" or "written") is for the message."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:  # gcsfs and its network library raise many kinds
        if not is_remote(path):
            raise
        problem = f"cannot be {action} ({type(error).__name__}: {first_line(error)}); {_CHECK_ACCESS}"
        raise StorageError(problem, field=os.fspath(path)) from error


@contextlib.contextmanager
def replace_file(path: pathlib.Path, durable: bool = False) -> Iterator[pathlib.Path]:
    """Yields a temporary path whose file becomes the local file `path`, unless an error is raised.

    With `durable` content and name are then on the disk. Missing folders are created. An OSError names `path`, and an
    existing file of that name is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem[:16]}.{uuid.uuid4().hex}{path.suffix}")  # unique across machines
    try:
        yield temporary
        if durable:
            _sync(temporary)
        temporary.replace(path)
        if durable:
            _sync(path.parent)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error  # becomes the same subclass
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike, content: bytes, durable: bool = False) -> None:
    """Writes a file, locally as `replace_file` does; it appears under its name only when it is complete."""
    path = resolve_path(path)
    if is_remote(path):
        with convert_errors(path, "written"):
            path.write_bytes(content)
    else:
        with replace_file(path, durable) as temporary:
            temporary.write_bytes(content)


def create_file(path: Path, content: bytes) -> bool:
    """Writes a file unless one of that name exists; returns whether it did, which is true in one program only."""
    try:
        if is_remote(path):
            system, name = _file_system(os.fspath(path), "--workdir")
            system.pipe_file(name, content, mode="create")
        else:
            with open(path, "xb") as file:
                file.write(content)
    except FileExistsError:
        return False
    return True


def apply_umask(path: pathlib.Path) -> None:
    """Gives a local file the permissions of new files in its folder; some libraries restrict them to the owner."""
    sample = path.with_name(f".{uuid.uuid4().hex}")  # reading the umask itself changes it for other threads
    try:
        sample.touch()
        mode = sample.stat().st_mode
    finally:
        sample.unlink(missing_ok=True)
    if path.stat().st_mode != mode:
        path.chmod(mode & 0o777)


@contextlib.contextmanager
def stage_output(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a local path for a file or folder: `path` itself, or a temporary one that is uploaded to it at the end."""
    target = resolve_path(path)
    if not is_remote(target):
        yield target
        return
    with tempfile.TemporaryDirectory(prefix="vqrae_jax-") as scratch:
        local = pathlib.Path(scratch) / target.name
        yield local
        for file in [local] if local.is_file() else sorted(p for p in local.rglob("*") if p.is_file()):
            write_bytes(target / file.relative_to(local).as_posix(), file.read_bytes())


def download(path: str | os.PathLike) -> pathlib.Path:
    """Returns a local path: `path` itself, or a cached copy of a remote file or of the files directly in a folder.

    Copies have the times of their originals (local clocks do not matter) and are renewed when size or time differ.
    The time is read before the content, which may be replaced meanwhile. Files that the bucket lacks are removed.
    """
    source = resolve_path(path)
    if not is_remote(source):
        return source
    digest = hashlib.sha256(os.fspath(source).encode()).hexdigest()[:16]
    local = runtime.cache_folder() / "files" / digest / source.name
    with convert_errors(source, "read"):
        files = {local / file.name: file for file in source.iterdir()} if source.is_dir() else {local: source}
        for copy, file in files.items():
            if not file.is_file():
                continue
            stat = file.stat()
            if not copy.is_file() or (copy.stat().st_size, copy.stat().st_mtime) != (stat.length, stat.mtime):
                write_bytes(copy, file.read_bytes())
                os.utime(copy, (stat.mtime, stat.mtime))
    for copy in local.iterdir() if local.is_dir() else ():
        if copy not in files and not copy.name.startswith("."):  # hidden files are being written
            copy.unlink(missing_ok=True)
    return local


class Mirror:
    """A `folder` for logs, which are appended to: `target`, or a temporary one that is uploaded to a bucket."""

    def __init__(self, target: Path):
        self.folder, self._target, self._scratch = target, target, None
        self._uploaded: dict[pathlib.Path, tuple[int, int]] = {}
        self._last = time.monotonic()
        if is_remote(target):
            self._scratch = tempfile.TemporaryDirectory(prefix="vqrae_jax-")
            self.folder = pathlib.Path(self._scratch.name)

    def restore(self, name: str) -> None:
        """Downloads a file of an earlier process, so that this one appends to it."""
        if self._scratch and (self._target / name).is_file():
            (self.folder / name).write_bytes((self._target / name).read_bytes())

    def upload(self, seconds: float = 0.0) -> None:
        """Uploads files that have changed, at most once in `seconds`; failed uploads are repeated at the next call."""
        if self._scratch is None or time.monotonic() - self._last < seconds:
            return
        self._last = time.monotonic()
        for file in sorted(p for p in self.folder.rglob("*") if p.is_file()):
            state = file.stat().st_size, file.stat().st_mtime_ns
            if self._uploaded.get(file) == state:
                continue
            try:
                write_bytes(self._target / file.relative_to(self.folder).as_posix(), file.read_bytes())
                self._uploaded[file] = state
            except StorageError as error:  # a run must not end because of its logs
                log.warning("%s; the upload is tried again later", error)
                return

    def close(self) -> None:
        """Uploads what has changed and removes the temporary folder."""
        self.upload()
        if self._scratch:
            self._scratch.cleanup()


def list_files(folder: str, field: str, recursive: bool = True) -> list[str]:
    """Returns the files in a local or remote folder, sorted within each folder; hidden ones are left out.

    Args:
      field: config field or argument that `folder` comes from.
      recursive: include subfolders. Symbolic links are followed, each folder is listed once.
    """
    if not is_remote(folder):
        return _list_local(folder, field, recursive)
    system, path = _file_system(folder, field)
    try:
        names = system.find(path, maxdepth=None if recursive else 1)
    except FileNotFoundError:
        names = []
    except Exception as error:  # each file system raises its own kinds
        problem = f"cannot be listed ({type(error).__name__}: {first_line(error)}); {_CHECK_ACCESS}"
        raise DataError(problem, field=field, value=folder) from error
    if not names:
        raise DataError("does not exist or is empty; check the bucket and the folder", field=field, value=folder)
    names = sorted(name.removeprefix(path.rstrip("/")) for name in names)  # each starts with a slash
    names = [name for name in names if "/." not in name and (recursive or "/" not in name[1:])]
    return [folder.rstrip("/") + name for name in names]


def list_folders(folder: str, field: str) -> list[str]:
    """Returns the names of the folders directly in a folder, sorted; hidden ones are left out."""
    if is_remote(folder):  # a bucket has no empty folders
        system, path = _file_system(folder, field)
        with convert_errors(folder, "read"):
            folders = [entry["name"] for entry in system.ls(path, detail=True) if entry["type"] == "directory"]
    elif os.path.isdir(folder):
        folders = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    else:
        raise DataError("does not exist or is not a folder", field=field, value=folder)
    names = (name.rstrip("/").rpartition("/")[2] for name in folders)
    return sorted(name for name in names if not name.startswith("."))


def is_unusable(error: OSError) -> bool:
    """Returns whether the file of an error is missing or not meant to be read, and not the disk or bucket at fault."""
    return isinstance(error, FileNotFoundError) or error.errno in _UNUSABLE


def check_regular(path: str | os.PathLike, limit: int | None = None) -> None:
    """Raises OSError unless a local path is a regular file (the end of a pipe or device may never come) of `limit`."""
    _check_status(path, os.stat(path), limit)


def read_bytes(path: str, start: int = 0, end: int | None = None, limit: int | None = None) -> bytes:
    """Returns bytes [start, end) of a file, fewer if it ends earlier; see `open_file`."""
    if not is_remote(path):
        with open_file(path, limit) as file:
            file.seek(start)
            return file.read(-1 if end is None else end - start)
    system, name = _file_system(path, "data.path")
    with _os_errors(path):
        return system.cat_file(name, start=start, end=end)


def open_file(path: str | os.PathLike, limit: int | None = None) -> Any:
    """Opens a file for reading and seeking; raises OSError, now or later, if it is missing or not readable.

    A local path that is not a regular file, or has more than `limit` bytes, is an OSError too.
    """
    path = expand_home(path)
    if not is_remote(path):
        check_regular(path, limit)
        return open(path, "rb", opener=functools.partial(_open_regular, limit=limit))
    system, name = _file_system(path, "data.path")
    with _os_errors(path):
        return _RemoteFile(system.open(name, "rb"), path)


def hash_file(path: Path) -> str:
    """Returns the SHA-256 of a file's content; raises OSError if it is missing or not readable."""
    with open_file(os.fspath(path)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_versions(folder: Path) -> dict[str, tuple[int, Any]]:
    """Maps the names of all files below a folder, relative to it, to their sizes and times; none if it is missing."""
    if not is_remote(folder):
        files = {file: file.stat() for file in pathlib.Path(folder).rglob("*") if file.is_file()}
        return {file.relative_to(folder).as_posix(): (stat.st_size, stat.st_mtime_ns) for file, stat in files.items()}
    system, path = _file_system(os.fspath(folder), "data.path")
    with _os_errors(os.fspath(folder)):
        system.invalidate_cache(path)
        infos = system.find(path, detail=True, update_cache=False)
    return {name.removeprefix(f"{path}/"): (info["size"], info.get("generation")) for name, info in infos.items()}


def check_unpacked(path: str | os.PathLike) -> None:
    """Raises OSError if a zip archive (.npz, .pt) unpacks to far more than its size, as numbers never do."""
    with zipfile.ZipFile(path) as archive:
        total = sum(member.file_size for member in archive.infolist())
    if total > max(_UNPACKED, _RATIO * os.path.getsize(path)):
        raise OSError(errno.EFBIG, f"unpacks to {total} bytes", os.fspath(path))


def file_size(path: str) -> int:
    """Returns the number of bytes of a file; raises OSError if it is missing or not readable."""
    with open_file(path) as file:
        return file.seek(0, os.SEEK_END)


class _RemoteFile(io.RawIOBase):
    """A file of fsspec that raises only OSErrors with a kind, as local files do."""

    def __init__(self, file: Any, path: str):
        self._file, self._path = file, path
        self.readable, self.seekable, self.seek = file.readable, file.seekable, file.seek

    def readinto(self, buffer: Any) -> int:
        with _os_errors(self._path):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


@contextlib.contextmanager
def _os_errors(path: str) -> Iterator[None]:
    """Converts every error to FileNotFoundError (a missing file) or ConnectionError."""
    try:
        yield
    except Exception as error:  # each file system raises its own kinds
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ConnectionError
        raise kind(f"{path!r}: {type(error).__name__}: {first_line(error)}") from error


def _open_regular(path: str, flags: int, limit: int | None) -> int:
    """Opens a file as `os.open` does; a pipe that has replaced it since a check neither blocks nor is read."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    try:
        _check_status(path, os.fstat(descriptor), limit)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _check_status(path: str | os.PathLike, status: os.stat_result, limit: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.ENODEV
        raise OSError(kind, "is not a regular file", os.fspath(path))
    if limit is not None and status.st_size > limit:
        raise OSError(errno.EFBIG, f"has {status.st_size} bytes, more than the limit of {limit}", os.fspath(path))


def _list_local(folder: str, field: str, recursive: bool) -> list[str]:
    if not os.path.isdir(folder or "."):
        problem = "is a file, not a folder" if os.path.exists(folder) else "does not exist"
        raise DataError(problem, field=field, value=folder)
    files, visited = [], set()

    def fail(error: OSError) -> None:
        problem = f"{error.filename!r} cannot be listed ({error.strerror}); its images would be missing"
        raise DataError(problem, field=field, value=folder) from error

    for parent, folders, names in os.walk(folder or ".", followlinks=True, onerror=fail):
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if recursive and not name.startswith("."))
        files += [os.path.join(parent, name) for name in sorted(names) if not name.startswith(".")]
    return files if folder else [os.path.normpath(file) for file in files]


def _file_system(path: str, field: str) -> tuple[Any, str]:
    """Returns fsspec's file system for an address and the path within it."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:  # an ImportError names the package to install
        raise ConfigError(f"{first_line(error)}; gs://, s3:// etc. are supported", field=field, value=path) from error


def _sync(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
