"""Codes -> pictures: exactly what `reconstruct` paints, and only codes of the same tokenizer."""

import numpy as np
import pytest

from benchmarks.training_input import write_photographs
from vqrae_jax import Tokenizer
from vqrae_jax.commands import detokenize, reconstruct, tokenize
from vqrae_jax.data import images
from vqrae_jax.errors import DataError


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(11):
        images.write_image(folder / f"{i:02d}.png", rng.integers(0, 256, (34 + i, 40, 3), np.uint8))
    return folder


@pytest.fixture(scope="module")
def tokenized(trained, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("codes")
    given = [f"--checkpoint={trained}", f"--data={photos}", f"--output={folder}", "--batch=8", "--shard-size=8"]
    tokenize.tokenize(tokenize.parse([*given, "--format=parquet"]))
    return folder


def run(checkpoint, codes, output, *arguments):
    given = [f"--checkpoint={checkpoint}", f"--codes={codes}", f"--output={output}", "--batch=8", *arguments]
    return detokenize.detokenize(detokenize.parse(given))


def test_round_trip_equals_reconstruct_byte_for_byte(trained, photos, tokenized, tmp_path):
    given = [f"--checkpoint={trained}", "--image", str(photos), f"--output={tmp_path / 'a'}", "--only", "--batch=8"]
    expected = reconstruct.reconstruct(reconstruct.parse(given))
    painted = run(trained, tokenized, tmp_path / "b")
    assert [path.name for path in painted] == [f"{i:08d}.png" for i in range(11)]
    assert [path.read_bytes() for path in painted] == [path.read_bytes() for path in expected]


@pytest.mark.slow
def test_a_thousand_photographs_come_back_as_reconstruct_paints_them(trained, tmp_path):
    photographs = write_photographs(tmp_path / "photographs", 1000)
    given = [f"--checkpoint={trained}", f"--data={photographs}", f"--output={tmp_path / 'codes'}"]
    assert tokenize.tokenize(tokenize.parse([*given, "--batch=8", "--shard-size=256"]))["count"] == 1000
    painted = run(trained, tmp_path / "codes", tmp_path / "painted")
    given = [f"--checkpoint={trained}", "--image", photographs, f"--output={tmp_path / 'whole'}", "--only", "--batch=8"]
    expected = reconstruct.reconstruct(reconstruct.parse(given))
    assert len(painted) == 1000
    assert [path.read_bytes() for path in painted] == [path.read_bytes() for path in expected]


def test_an_array_of_codes_and_views(trained, photos, tokenized, tmp_path):
    grids = np.random.default_rng(0).integers(0, 32, (3, 4, 4)).astype(np.int64)
    np.save(tmp_path / "made up.npy", grids)
    painted = run(trained, tmp_path / "made up.npy", tmp_path / "pictures", "--limit=2")
    assert len(painted) == 2
    expected = Tokenizer.load(trained).decode_from_indices(grids[:1])[0]
    assert np.abs(images.read_image(painted[0]) / 255 - expected).max() <= 0.5 / 255 + 1e-5

    given = [f"--checkpoint={trained}", f"--data={photos}", f"--output={tmp_path / 'codes'}", "--views=flip"]
    tokenize.tokenize(tokenize.parse([*given, "--limit=2"]))
    names = [path.name for path in run(trained, tmp_path / "codes", tmp_path / "views")]
    assert names == ["00000000_0.png", "00000000_1.png", "00000001_0.png", "00000001_1.png"]


def test_pictures_may_be_called_by_their_ids(trained, tokenized, tmp_path):
    by_number = run(trained, tokenized, tmp_path / "a")
    by_id = run(trained, tokenized, tmp_path / "b", "--names=id", "--format=png")
    assert [path.name for path in by_id] == [f"{i:02d}.png" for i in range(11)]
    assert [path.read_bytes() for path in by_id] == [path.read_bytes() for path in by_number]
    np.save(tmp_path / "codes.npy", np.zeros((1, 4, 4), int))
    with pytest.raises(DataError, match=r"--names=id: .*codes\.npy is an array.*leave out --names"):
        run(trained, tmp_path / "codes.npy", tmp_path / "c", "--names=id")


def test_an_id_becomes_one_safe_file_name_that_no_other_has():
    ids = ["n01/a.png", "n01/a.jpg", "n01_A", "ü 猫.v2", "../../etc/passwd", ".hidden.png", "", "x" * 300, "ü" * 300]
    named = detokenize._Named()
    names = [named(name) for name in ids]
    assert names[:7] == ["n01_a", "n01_a_2", "n01_A_3", "ü_猫.v2", "_.._etc_passwd", "hidden", "_"]
    assert len({name.lower() for name in names}) == len(ids)
    assert all(len(name.encode()) <= 200 for name in names)


def test_codes_of_another_tokenizer_are_refused(trained, tokenized, tmp_path):
    other = Tokenizer.load(trained)
    quantizer = other.trained["batch_stats"]["quantizer"]
    moved = {**other.trained, "batch_stats": {"quantizer": {**quantizer, "codebook": quantizer["codebook"] + 1}}}
    folder = Tokenizer(other.module, moved, other.config).save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match=r"are of the tokenizer \w{12}, this one is \w{12}.*or --force"):
        run(folder, tokenized, tmp_path / "pictures")
    assert len(run(folder, tokenized, tmp_path / "pictures", "--force")) == 11


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        (np.full((1, 4, 4), 32), DataError, r"span \[32, 32\]; the codes are 0 to 31"),
        (np.zeros((1, 5, 5), int), DataError, r"shape \(1, 5, 5\); expected \[B, 4, 4\]"),
        (np.zeros((1, 4, 4)), DataError, "indices are float64"),
        (b"no array", DataError, "cannot be read as an array"),
    ],
)
def test_what_is_no_code(trained, tmp_path, array, error, message):
    path = tmp_path / "codes.npy"
    path.write_bytes(array) if isinstance(array, bytes) else np.save(path, array)
    with pytest.raises(error, match=message):
        run(trained, path, tmp_path / "pictures")


def test_a_folder_without_codes(trained, tmp_path):
    with pytest.raises(DataError, match=r"has no manifest\.json: give a folder that"):
        run(trained, tmp_path, tmp_path / "pictures")
