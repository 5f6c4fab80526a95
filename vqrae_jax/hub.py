"""The hub of Hugging Face: repositories of models and datasets, downloaded to its cache and read from there.

`field` is the config field that names a repository, for messages.
"""

import glob
import pathlib
from collections.abc import Callable
from typing import Any

from vqrae_jax import storage
from vqrae_jax.errors import DataError, UserError, WeightsError, first_line

REFUSED = (401, 403, 404)  # answers of a hub that is there; others, as 429 and 503, are those of a busy one
TIMEOUT = 10  # seconds until a hub that does not answer counts as unreachable


def is_hub_path(name: str, parts: int) -> bool:
    """Returns whether `name` has the form of a hub id (2 parts) or of a file inside a hub repository (3 or more)."""
    split = name.split("/", 2)
    return not storage.is_remote(name) and not name.startswith((".", "/", "~")) and len(split) == parts and all(split)


def fetch_dataset(name: str, select: Callable[[list[str]], list[str]], field: str) -> list[str]:
    """Returns local paths of the files that `select` returns of a dataset (owner/name or owner/name@revision).

    Without a network it selects from the files in the cache.
    """
    repository, _, revision = name.partition("@")
    options: dict[str, Any] = {"repo_type": "dataset", "revision": revision or None}

    def load(files: list[str] | None) -> str:
        import huggingface_hub

        patterns = None if files is None else [glob.escape(file) for file in select(files)]
        return huggingface_hub.snapshot_download(
            repository, allow_patterns=patterns, local_files_only=files is None, **options
        )

    folder = download(repository, load, name, field, DataError, **options)
    cached = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    return [f"{folder}/{file}" for file in select(cached)]


def download(
    repository: str, load: Callable[[list[str] | None], str], name: str, field: str,
    kind: type[UserError] = WeightsError, **options: Any,
) -> pathlib.Path:  # fmt: skip
    """Returns the local path from `load`, called with the file names of a repository.

    If the hub is unreachable, `load` is called with None: it reads the cache only.

    Args:
      name: value of the field, for messages.
      kind: class of the error.
      options: repo_type and revision of the repository, arguments of the hub's client.
    """
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    try:
        try:
            files = _list_files(repository, **options)
        except Exception as unreachable:
            if isinstance(unreachable, HfHubHTTPError) and unreachable.response.status_code in REFUSED:
                raise
            try:
                return pathlib.Path(load(None))
            except Exception:
                raise unreachable from None
        return pathlib.Path(load(files))
    except UserError:
        raise
    except Exception as error:  # the hub client raises many kinds: no network, no such model, gated, disk full
        if isinstance(error, GatedRepoError):
            page = f"https://huggingface.co/{'datasets/' if 'repo_type' in options else ''}{repository}"
            message = f"accept its license at {page} and set HF_TOKEN to a token of yours"
            raise kind(message, field=field, value=name) from error
        raise kind(
            f"is not a path on this machine and cannot be downloaded from the hub ({type(error).__name__}: "
            f"{first_line(error)}); download it where there is a network and pass the local path, or set HF_HOME to a "
            "cache that has it",
            field=field, value=name,
        ) from error  # fmt: skip


def _list_files(repository: str, **options: Any) -> list[str] | None:
    """Returns the file names of a hub repository; None in offline mode.

    One request with a short timeout, because downloads try for half a minute to reach the hub.
    """
    import huggingface_hub

    if huggingface_hub.is_offline_mode():
        return None
    info = huggingface_hub.HfApi().repo_info(repository, timeout=TIMEOUT, **options)
    return [file.rfilename for file in info.siblings]
