"""The files of a dataset by folders, patterns and lists, and those of datasets on the hub."""

import fnmatch
import types

import fsspec
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vqrae_jax.config import DataConfig
from vqrae_jax.data.pipeline import evaluation_source, training_source
from vqrae_jax.data.shards import Split, list_shards
from vqrae_jax.errors import DataError


def write_files(system, folder, *names):
    for name in names:
        system.pipe(f"{folder}/{name}", name.encode())


@pytest.mark.parametrize("kind", ["local", "bucket"])
def test_shards_are_a_folder_a_file_a_pattern_or_a_range(tmp_path, bucket, kind):
    names = [f"train-{i:02d}.tar" for i in range(11)]
    other = ["train.txt", ".train-00.tar", "deep/train-99.tar"]
    if kind == "local":
        folder = f"{tmp_path}/a [x] ü"
        write_files(fsspec.filesystem("file", auto_mkdir=True), folder, *names, *other)
    else:
        folder = "memory://a b/ü"
        write_files(bucket, "/a b/ü", *names, *other)
    shards = [f"{folder}/{name}" for name in names]
    expected = dict.fromkeys(("", "/", "/train-*.tar"), shards)
    expected |= {"/*-0?.tar": shards[:10], "/train-{03..10}.tar": shards[3:], "/train-07.tar": shards[7:8]}
    for pattern, files in expected.items():
        assert list_shards(folder + pattern, (".tar",), "data.path") == files
    with pytest.raises(DataError, match=r"2 of 4 .*train-11\.tar") as error:
        list_shards(f"{folder}/train-{{09..12}}.tar", (".tar",), "data.path")
    assert error.value.field == "data.path"
    with pytest.raises(DataError, match=r"\.parquet"):
        list_shards(folder, (".parquet",), "data.path")


@pytest.fixture(params=["local", "bucket"])
def tree(request, tmp_path, bucket):
    """Two folders of three shards each, and one with another name."""
    names = [f"{folder}/{name}-{i}.tar" for folder in "abc" for name in ("train", "val") for i in range(3)]
    if request.param == "bucket":
        write_files(bucket, "/data", *names)
        return "memory://data"
    write_files(fsspec.filesystem("file", auto_mkdir=True), tmp_path, *names)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a/train-{0,1}.tar", "a0 a1"), ("a/train-[01].tar", "a0 a1"), ("a/train-[!1].tar", "a0 a2"),
        ("a/train-{2..0}.tar", "a2 a1 a0"), ("{a,b}/train-*.tar", "a0 a1 a2 b0 b1 b2"), ("[bc]/train-1.tar", "b1 c1"),
        ("?/train-{1..2}.tar", "a1 b1 c1 a2 b2 c2"), ("{c,{a,b}}/train-0.tar", "c0 a0 b0"),
        ("b/train-2.tar::DATA/a/train-{0..1}.tar::DATA/c/train-*", "b2 a0 a1 c0 c1 c2"),
        ("a/train*::DATA/{b,c}/val-0.tar", "a0 a1 a2 bval0 cval0"),
    ],
)  # fmt: skip
def test_patterns_have_alternatives_in_files_and_folders(tree, pattern, expected):
    pattern = f"{tree}/{pattern}".replace("DATA", tree)
    names = [name if "val" in name else f"{name[0]}train{name[1:]}" for name in expected.split()]
    files = [f"{tree}/{name[0]}/{name[1:-1]}-{name[-1]}.tar" for name in names]
    assert list_shards(pattern, (".tar",), "data.path") == files


@pytest.mark.parametrize(
    "pattern",
    [
        "a/train-{0,3}.tar", "{a,d}/train-*.tar", "[de]/train-0.tar", "a/train-*.tar::DATA/a/train-1.tar",
        "a/train-{0..999999999}.tar", "a/train-*.tar::", "a/*",
        pytest.param("a/train-{0..99999}{0..99999}.tar", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_what_a_pattern_names_must_exist_once(tree, pattern):
    with pytest.raises(DataError) as error:
        list_shards(f"{tree}/{pattern}".replace("DATA", tree), (".tar",), "data.path")
    assert error.value.field == "data.path"


def test_the_name_of_a_folder_may_look_like_a_file_or_a_pattern(tmp_path):
    for name in ("a.tar", "{a,b}", "c::d", "[ab]"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "{0,1}.tar").touch()
        for path in (name, f"{name}/{{0,1}}.tar"):
            assert list_shards(tmp_path / path, (".tar",), "data.path") == [f"{tmp_path}/{name}/{{0,1}}.tar"]


def test_relative_patterns_name_files_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "train-0.tar").touch()
    monkeypatch.chdir(tmp_path)
    assert list_shards("train-*.tar", (".tar",), "data.path") == ["train-0.tar"]


@pytest.mark.parametrize("name", ["train-0.tar.gz", "train-0.tgz", "train-0.tar.zst"])
def test_compressed_shards_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    for path in (tmp_path / name, tmp_path, f"{tmp_path}/train-*"):
        with pytest.raises(DataError, match=rf"{name}' is compressed") as error:
            list_shards(path, (".tar",), "--data")
        assert error.value.field == "--data"


def test_several_splits_are_refused(tmp_path):
    for name in ("train-00000-of-00002.parquet", "validation-00000-of-00001.parquet"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"\(train, validation\).*train\*\.parquet"):
        list_shards(tmp_path, (".parquet",), "data.path")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A dataset "owner/name" on a hub, whose client copies files to a cache; its attributes are what a test sets."""
    hub = types.SimpleNamespace(files=[], online=True, downloads=[], cache=tmp_path / "cache")

    def repo_info(self, repository, timeout, repo_type, revision):
        assert (repository, repo_type, revision) == ("owner/name", "dataset", hub.revision)
        if not hub.online:
            raise ConnectionError("name not known")
        return types.SimpleNamespace(siblings=[types.SimpleNamespace(rfilename=name) for name in hub.files])

    def snapshot_download(repository, repo_type, revision, allow_patterns, local_files_only):
        assert (repository, repo_type, revision) == ("owner/name", "dataset", hub.revision)
        if local_files_only and not hub.cache.exists():
            raise FileNotFoundError("not in the cache")
        for name in hub.files:
            if hub.online and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                hub.downloads.append(name)
                (hub.cache / name).parent.mkdir(parents=True, exist_ok=True)
                pq.write_table(pa.table({"image": [name.encode()]}), hub.cache / name)
        return str(hub.cache)

    hub.revision = None
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return hub


FILES = [f"data/{name}-0000{i}-of-00002.parquet" for name in ("train", "test") for i in (1, 0)]


def test_a_dataset_on_the_hub_is_downloaded_by_splits(repository):
    repository.files = [*FILES, "README.md", "data/train.tar", "train[1].parquet"]
    data = DataConfig(source="parquet", path="owner/name", eval_path="owner/name", eval_split="test")
    for source, split in ((training_source(data), "train"), (evaluation_source(data), "test")):
        expected = [f"data/{split}-0000{i}-of-00002.parquet" for i in (0, 1)]
        assert [source[i]["image"].decode() for i in range(len(source))] == expected
    assert sorted(repository.downloads) == sorted(FILES)
    repository.online = False
    assert len(training_source(data)) == 2
    (repository.cache / FILES[0]).unlink()  # as after a download that was interrupted
    with pytest.raises(DataError, match="1 of 2 files") as error:
        training_source(data)
    assert (error.value.field, error.value.value) == ("data.train_split", "train")
    repository.online, repository.revision = True, "refs/convert/parquet"
    assert len(list_shards("owner/name@refs/convert/parquet", (".parquet",), "data.path")) == 2


@pytest.mark.parametrize(
    ("files", "split", "result"),
    [
        (["a/train/0.parquet", "a/test/0.parquet"], Split("test"), "a/test/0.parquet"),
        (["a/partial-train/0.parquet"], Split("train"), "data.train_split"),
        (["a/train-0.parquet", "b/train-0.parquet"], Split("train"), "data.name"),
        (["a/train-0.parquet", "b/train-0.parquet"], Split("train", "b"), "b/train-0.parquet"),
        (["test/train-0.parquet", "test/test-0.parquet"], Split("test"), "test/test-0.parquet"),
        (["x-train-0.tar"], Split("train"), "data.train_split"), ([], Split("val", None, "--split"), "--split"),
        (["imagenet_train.parquet"], Split("train"), "imagenet_train.parquet"),
        (["a_train-0.parquet", "b_train-0.parquet"], Split("train"), "data.train_split"),
        (["train-0.parquet", "train_b-0.parquet"], Split("train"), "train-0.parquet"),
        (["pretrain-0.parquet", "training-0.parquet"], Split("train"), "data.train_split"),
    ],
)  # fmt: skip
def test_the_files_of_a_split_have_its_name(repository, files, split, result):
    repository.files = files
    if result in files:
        assert list_shards("owner/name", (".parquet",), "data.path", split) == [f"{repository.cache}/{result}"]
        return
    with pytest.raises(DataError) as error:
        list_shards("owner/name", (".parquet",), "data.path", split)
    assert error.value.field == result
    assert not repository.downloads


@pytest.mark.parametrize("path", ["owner/name", "./owner/name", "owner/name/more", "local/name"])
def test_paths_that_are_missing_are_errors_without_a_network(repository, path):
    (repository.cache.parent / "local").mkdir()
    repository.online = False
    with pytest.raises(DataError, match="ConnectionError" if path == "owner/name" else "exist") as error:
        list_shards(path, (".parquet",), "data.path")
    assert error.value.field == "data.path"
