"""Files here and in buckets (gs://, s3://, what fsspec knows) behind the few calls that readers need."""

import fnmatch
import io
import os
import re

from vqrae_jax.errors import ConfigError, DataError, ImageError
from vqrae_jax.storage import is_remote

_COMPRESSED = (".bz2", ".gz", ".tgz", ".xz", ".zst")
_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "az": "adlfs", "abfs": "adlfs", "hf": "huggingface_hub"}


def below(path: str, field: str) -> list[str]:
    """Every file in and below an address, as addresses, sorted; hidden ones are left out.

    Raises:
      DataError: naming `field`, for a place that is missing, empty, forbidden or of an unknown kind.
    """
    system, place = _system(path, field)
    found = _asked(lambda: system.find(place), path, field)
    if not found:
        raise DataError(f"{field}={path!r} does not exist or is empty: check the name of the bucket and the folder")
    inside = sorted(name.removeprefix(place.rstrip("/")) for name in found)
    return [path.rstrip("/") + name for name in inside if not any(part.startswith(".") for part in name.split("/"))]


def shards(path: str | os.PathLike, suffixes: tuple[str, ...], field: str) -> list[str]:
    """The files that make up one split of a dataset, in order.

    Args:
      path: a file, a folder that holds nothing but one split, or a pattern with *, ? or a range as in
        "train-{0000..0146}.tar"; each here or in a bucket.

    Raises:
      DataError: naming `field`: nothing there, a shard of a range that is missing, or several splits.
    """
    path = os.path.expanduser(os.fspath(path))
    kinds = " or ".join(suffixes)
    if ranged := re.search(r"\{(\d+)\.\.(\d+)\}", path):
        first, last = ranged[1], ranged[2]
        numbers = range(int(first), int(last) + 1)
        found = [f"{path[: ranged.start()]}{number:0{len(first)}d}{path[ranged.end() :]}" for number in numbers]
        there = set(_listed(os.path.dirname(path), field))
        if missing := [name for name in found if name not in there]:
            raise DataError(
                f"{field}={path!r}: {len(missing)} of {len(found)} are missing, the first is {missing[0]!r}"
            )
    elif re.search(r"[*?]", path):
        folder, pattern = os.path.split(path)
        found = [name for name in _listed(folder, field) if fnmatch.fnmatchcase(os.path.basename(name), pattern)]
    else:
        found = [path] if path.endswith((*suffixes, *_COMPRESSED)) else _listed(path, field)
    packed = next((name for name in found if name.endswith(_COMPRESSED)), None)
    found = [name for name in found if name.endswith(suffixes)]
    if not found and packed:
        raise DataError(
            f"{field}={path!r}: {packed!r} is compressed, so that it cannot be read at random: unpack it before, "
            f"as a .tar.gz to .tar (gunzip), and give {kinds} files"
        )
    if not found:
        raise DataError(f"{field}={path!r} has no {kinds} files: give a folder of them, a file or a pattern")
    splits = sorted({re.sub(r"[-_.]?\d+(-of-\d+)?$", "", name[: name.rindex(".")]) for name in found})
    if len(splits) > 1:
        raise DataError(
            f"{field}={path!r} holds several splits ({', '.join(map(os.path.basename, splits[:5]))}): "
            f"name one by a pattern, as in {splits[0] + '*' + suffixes[0]!r}"
        )
    return found


def size(path: str) -> int:
    """Bytes of a file.

    Raises:
      OSError: it is missing or may not be read.
    """
    if not is_remote(path):
        return os.path.getsize(path)
    return _as_os_error(lambda system, place: system.size(place), path)


def read(path: str, start: int = 0, end: int | None = None) -> bytes:
    """Bytes [start, end) of a file; it is opened anew each time, as thousands held open exceed many systems' limit.

    Raises:
      OSError: it is missing (FileNotFoundError) or may not be read.
      ImageError: it ends before `end`.
    """
    if is_remote(path):
        data = _as_os_error(lambda system, place: system.cat_file(place, start=start, end=end), path)
    else:
        with open(path, "rb") as file:
            file.seek(start)
            data = file.read(-1 if end is None else end - start)
    if end is not None and len(data) != end - start:
        raise ImageError(f"{path!r} is cut short: it ends before byte {end}")
    return data


def opened(path: str):
    """A binary file to seek and read in.

    Raises:
      OSError: it is missing or may not be read, now or later.
    """
    if not is_remote(path):
        return open(path, "rb")
    return _Remote(_as_os_error(lambda system, place: system.open(place, "rb"), path), path)


class _Remote(io.RawIOBase):
    """A file in a bucket; it is read ahead by what fsspec opens, and what that raises becomes an OSError."""

    def __init__(self, file, path: str):
        self._file, self._path = file, path

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer) -> int:
        data = _as_os_error(lambda *_: self._file.read(len(buffer)), self._path)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def _listed(folder, field):
    """The files directly in a folder, sorted, under the folder's own name."""
    if is_remote(folder):
        start = len(folder.rstrip("/")) + 1
        return [name for name in below(folder, field) if "/" not in name[start:]]
    if not os.path.isdir(folder or "."):
        what = "is a file" if os.path.exists(folder) else "does not exist"
        raise DataError(f"{field}: {folder!r} {what}: give a folder, a file or a pattern of files")
    names = [os.path.join(folder, name) for name in sorted(os.listdir(folder or ".")) if not name.startswith(".")]
    return [name for name in names if os.path.isfile(name)]


def _system(path, field):
    import fsspec

    protocol = path.split("://")[0]
    try:
        return fsspec.core.url_to_fs(path)
    except ImportError as error:
        package = _PACKAGES.get(protocol, f"fsspec's package for {protocol}")
        raise ConfigError(f"{field}={path!r}: reading {protocol}:// needs {package}: pip install {package}") from error
    except ValueError as error:
        raise ConfigError(f"{field}={path!r}: {error}; known are gs://, s3:// and what fsspec lists") from error


def _asked(question, path, field):
    try:
        return question()
    except FileNotFoundError:
        return []
    except Exception as error:  # every kind of bucket has errors of its own
        raise DataError(
            f"{field}={path!r} cannot be listed ({type(error).__name__}: {str(error)[:200]}): check the name and that "
            "this machine's account may read it (gcloud auth application-default login, or the instance's scopes)"
        ) from error


def _as_os_error(action, path):
    """What is missing raises FileNotFoundError, all else that a bucket refuses ConnectionError."""
    system, place = _system(path, "data.path")
    try:
        return action(system, place)
    except Exception as error:  # every kind of bucket has errors of its own
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ConnectionError
        raise kind(f"{path!r}: {type(error).__name__}: {str(error)[:200]}") from error
