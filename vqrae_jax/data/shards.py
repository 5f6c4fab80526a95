"""The files of a dataset: folders, patterns and lists of them, local, in buckets or of the hub."""

import collections
import fnmatch
import functools
import itertools
import json
import os
import re
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from vqrae_jax import hub, storage
from vqrae_jax.errors import DataError

_COMPRESSED = (".bz2", ".gz", ".tgz", ".xz", ".zst")
_BRACES = re.compile(r"\{(?:([^{}]*,[^{}]*)|(\d{1,9})\.\.(\d{1,9}))\}")
_MAGIC = re.compile(r"[*?[]")
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+(@\S+)?")
_MAX_PARTS = 100_000  # alternatives of a pattern with braces


class Split(NamedTuple):
    """The files of a dataset on the hub that are used."""

    name: str = "train"
    config: str | None = None  # folder of its files, for a dataset with several configurations
    field: str = "data.train_split"  # config field or argument that the name comes from


TRAIN = Split()


def list_shards(path: str | os.PathLike, suffixes: tuple[str, ...], field: str, split: Split = TRAIN) -> list[str]:
    """Lists the files that make up one split of a dataset, in order.

    Args:
      path: a file, a folder that holds nothing but one split, or a pattern with *, ?, [01], {a,b} or {000..127} in the
        names of files and folders; several are separated by "::". Local or in a bucket. Or a dataset on the hub, as
        owner/name or owner/name@revision, whose files are downloaded to its cache.
      suffixes: accepted ends of file names.
      field: config field or argument that `path` comes from.
      split: part of a dataset on the hub.
    """
    path = storage.expand_home(path)
    if _HUB_ID.fullmatch(path) and not path.endswith(suffixes) and not os.path.isdir(path.partition("/")[0]):
        select = functools.partial(_select_split, suffixes=suffixes, split=split)
        return hub.fetch_dataset(path, select, field)

    def error(problem: str) -> DataError:
        return DataError(problem, field=field, value=path)

    parts = [path] if os.path.exists(path) else list(itertools.islice(_expand(path), _MAX_PARTS + 1))
    if len(parts) > _MAX_PARTS:
        raise error(f"the pattern has more than {_MAX_PARTS} alternatives")
    list_folder = functools.cache(lambda folder: dict.fromkeys(storage.list_files(folder, field, recursive=False)))
    ends, check = (*suffixes, *_COMPRESSED), len(parts) > 1
    groups = [_select_files(_list_part(part, ends, list_folder, field, check), suffixes, error) for part in parts]
    missing = [part for part, files in zip(parts, groups, strict=True) if not files]
    if missing and len(parts) > 1:
        raise error(f"{len(missing)} of {len(parts)} shards or patterns are missing, the first is {missing[0]!r}")
    if missing:
        folders = storage.list_folders(path, field) if os.path.isdir(path) else []
        listed = f"; its folders are {', '.join(folders[:5])}" if folders else ""
        raise error(f"no {' or '.join(suffixes)} files{listed}; expected a folder of them, a file or a pattern")
    files = list(itertools.chain(*groups))
    name, count = collections.Counter(files).most_common(1)[0]
    if count > 1:
        raise error(f"names {name!r} {count} times")
    return files


def _select_files(files: Collection[str], suffixes: tuple[str, ...], error: Callable[[str], DataError]) -> list[str]:
    """Returns the files that end in one of the suffixes; raises an error for compressed ones and for several splits."""
    selection = [name for name in files if name.endswith(suffixes)]
    compressed = [name for name in files if name.endswith(_COMPRESSED)]
    if compressed and not selection:
        problem = "is compressed and cannot be read in random access; unpack it (gunzip) to"
        raise error(f"{compressed[0]!r} {problem} {' or '.join(suffixes)} files")
    if len(splits := _splits(selection)) > 1:
        pattern = f"{splits.most_common(1)[0][0]}*{os.path.splitext(selection[0])[1]}"
        raise error(f"several splits ({', '.join(sorted(splits)[:5])}); select one with a pattern such as {pattern!r}")
    return selection


def _select_split(files: list[str], suffixes: tuple[str, ...], split: Split) -> list[str]:
    """Returns the files of a hub dataset whose name is, or has as a word, that of the split, or else their folder's."""
    folder, word = f"{split.config}/" if split.config else "", rf"(^|[._-]){re.escape(split.name)}[._-]"
    files = sorted(name for name in files if name.endswith(suffixes) and name.startswith(folder))
    words = [name for name in files if re.search(word, os.path.basename(name))]
    selection = [name for name in words if split.name in _splits([name])] or words
    selection = selection or [name for name in files if split.name in name.split("/")[:-1]]
    if not selection or (words and len(_splits(selection)) > 1):
        names = sorted({os.path.join(os.path.dirname(name), *_splits([name])) for name in selection or files})
        problem = f"{'several kinds of' if selection else 'no'} {' or '.join(suffixes)} files have this name"
        raise DataError(f"{problem}; expected one of {', '.join(names[:20])}", field=split.field, value=split.name)
    configs = sorted({os.path.dirname(name) for name in selection})
    if len(configs) > 1:
        problem = f"several configurations have this split ({', '.join(configs[:20])}); choose one"
        raise DataError(problem, field="data.name", value=split.config)
    total = re.search(r"-of-(\d+)\.", selection[0])
    if total and len(selection) != int(total[1]):
        problem = f"{len(selection)} of {int(total[1])} files are in the cache; download again where there is a network"
        raise DataError(problem, field=split.field, value=split.name)
    return selection


def _splits(files: Collection[str]) -> collections.Counter[str]:
    """Counts the names of files without their numbers and ends."""
    stems = (os.path.splitext(os.path.basename(name))[0] for name in files)
    return collections.Counter(re.sub(r"[-_.]?\d+(-of-\d+)?$", "", stem) for stem in stems)


def _expand(path: str) -> Iterator[str]:
    """Yields the parts of a path that "::" separates, with the home folder and the alternatives of their braces."""
    for pattern in path.split("::"):
        alternatives = itertools.islice(_expand_braces(storage.expand_home(pattern)), _MAX_PARTS + 1)
        yield from dict.fromkeys(alternatives)  # {a,{b,c}} has a twice


def _expand_braces(pattern: str) -> Iterator[str]:
    """Yields the alternatives of a pattern with {a,b} and {000..127}, which may be nested, in order."""
    if not (braces := _BRACES.search(pattern)):
        yield pattern
        return
    choices, first, last = braces.groups()
    if choices is None:
        step = 1 if int(first) <= int(last) else -1
        choices = (f"{i:0{len(first)}d}" for i in range(int(first), int(last) + step, step))
    else:
        choices = choices.split(",")
    for choice in choices:
        yield from _expand_braces(pattern[: braces.start()] + choice + pattern[braces.end() :])


def _list_part(
    part: str, ends: tuple[str, ...], list_folder: Callable[[str], Collection[str]], field: str, check: bool
) -> Collection[str]:
    """Returns the files of a folder, a pattern without braces, or a file, which `check` looks up; none if missing."""
    folder, name = os.path.split(part)
    is_pattern = _MAGIC.search(part)
    if os.path.isdir(part) or not (is_pattern or part.endswith(ends)):
        return _data_files(part, list_folder(part))
    if os.path.exists(part) or not (is_pattern or check):
        return [part]
    listings = [list_folder(parent) for parent in _match_folders(folder, field)]
    if any(part in files for files in listings):
        return [part]
    return [file for files in listings for file in files if fnmatch.fnmatchcase(os.path.basename(file), name)]


def _data_files(folder: str, files: Collection[str]) -> Collection[str]:
    """Returns the files of a folder, or those that state.json of `datasets.save_to_disk` lists, without caches."""
    if (state := os.path.join(folder, "state.json")) not in files:
        return files
    try:
        names = [entry["filename"] for entry in json.loads(storage.read_bytes(state))["_data_files"]]
        return [os.path.join(folder, os.path.basename(name)) for name in names]
    except (ValueError, TypeError, KeyError, RecursionError):  # a file of another program
        return files


def _match_folders(pattern: str, field: str) -> list[str]:
    """Returns the folders whose path matches a pattern, sorted."""
    if not _MAGIC.search(pattern) or os.path.isdir(pattern):
        return [pattern]
    parent, name = os.path.split(pattern)
    folders = _match_folders(parent, field)
    names = {folder: storage.list_folders(folder or ".", field) for folder in folders}
    return [os.path.join(f, n) for f in folders for n in names[f] if fnmatch.fnmatchcase(n, name)]
