import numpy as np
import pytest

from vqrae_jax import Tokenizer
from vqrae_jax.commands import detokenize, reconstruct, tokenize
from vqrae_jax.data import images
from vqrae_jax.errors import DataError


def run(checkpoint, codes, output, *arguments):
    arguments = [f"--checkpoint={checkpoint}", f"--codes={codes}", f"--output={output}", "--batch=8", *arguments]
    return detokenize.detokenize(detokenize.parser.parse_args(arguments))


@pytest.fixture(scope="module")
def numbered(trained, tokenized, tmp_path_factory):
    """The images of `tokenized`, named by their numbers."""
    return run(trained, tokenized, tmp_path_factory.mktemp("numbered"))


def test_a_round_trip_equals_reconstruct_byte_for_byte(trained, photos, numbered, tmp_path):
    assert [path.name for path in numbered] == [f"{i:08d}.png" for i in range(21) if i != 5]
    arguments = [f"--checkpoint={trained}", f"--image={photos}", f"--output={tmp_path}", "--only", "--batch=8"]
    expected = reconstruct.reconstruct(reconstruct.parser.parse_args(arguments))
    assert [file.read_bytes() for file in numbered] == [file.read_bytes() for file in expected]


@pytest.mark.slow
def test_an_array_of_codes_and_views(trained, photos, tmp_path):
    indices = np.random.default_rng(0).integers(0, 32, (3, 4, 4)).astype(np.int64)
    np.save(tmp_path / "an array.npy", indices)
    written = run(trained, tmp_path / "an array.npy", tmp_path / "images", "--limit=2")
    assert len(written) == 2
    expected = Tokenizer.load(trained).decode_from_indices(indices[:1])[0]
    assert np.abs(images.read_image(written[0]) / 255 - expected).max() <= 0.5 / 255 + 1e-5

    arguments = [f"--checkpoint={trained}", f"--data={photos}", f"--output={tmp_path / 'codes'}", "--views=flip"]
    low = [*arguments, "--limit=2", "--encoder-dtype=bfloat16"]
    manifest = tokenize.tokenize(tokenize.parser.parse_args(low))
    assert manifest["encoding"].startswith("bfloat16")
    assert manifest["tokenizer"] == Tokenizer.load(trained, encoder_dtype="bfloat16").hash
    with pytest.raises(DataError, match="encoding"):  # codes of two dtypes are not mixed
        tokenize.tokenize(tokenize.parser.parse_args(low[:-1]))
    names = [path.name for path in run(trained, tmp_path / "codes", tmp_path / "views")]
    assert names == ["00000000_0.png", "00000000_1.png", "00000001_0.png", "00000001_1.png"]


def test_images_may_be_named_by_their_ids(trained, tokenized, numbered, tmp_path):
    by_id = run(trained, tokenized, tmp_path / "b", "--names=id", "--format=png")
    assert by_id[0].name == "cat_ü_photo_01.png"
    assert [file.read_bytes() for file in by_id] == [file.read_bytes() for file in numbered]
    np.save(tmp_path / "codes.npy", np.zeros((1, 4, 4), int))
    with pytest.raises(DataError) as error:
        run(trained, tmp_path / "codes.npy", tmp_path / "c", "--names=id")
    assert error.value.field == "--names"


def test_an_id_becomes_a_safe_and_unique_file_name():
    ids = ["n01/a.png", "n01/a.jpg", "n01_A", "ü 猫.v2", "../../etc/passwd", ".hidden.png", "", "x" * 300, "ü" * 300]
    used = set()
    names = [detokenize.unique_name(id, used) for id in ids]
    assert names[:7] == ["n01_a", "n01_a_2", "n01_A_3", "ü_猫.v2", "_.._etc_passwd", "hidden", "_"]
    assert len({name.lower() for name in names}) == len(ids)
    assert all(len(name.encode()) <= 200 for name in names)


def test_codes_of_another_tokenizer_need_force(trained, tokenized, tmp_path):
    other = Tokenizer.load(trained)
    quantizer = other.trained["batch_stats"]["quantizer"]
    changed = {**other.trained, "batch_stats": {"quantizer": {**quantizer, "codebook": quantizer["codebook"] + 1}}}
    folder = Tokenizer(other.module, changed, other.config).save_pretrained(tmp_path / "other")
    with pytest.raises(DataError) as error:
        run(folder, tokenized, tmp_path / "images")
    assert error.value.field == "--codes"
    assert len(run(folder, tokenized, tmp_path / "images", "--force")) == 20


def test_files_that_are_not_codes(trained, tmp_path):
    (tmp_path / "text.npy").write_bytes(b"not an array")
    for name, array, message in (
        ("value.npy", np.full((1, 4, 4), 32), "32.*31"), ("shape.npy", np.zeros((1, 5, 5), int), r"\(1, 5, 5\)"),
        ("dtype.npy", np.zeros((1, 4, 4)), "float64"), ("text.npy", None, "--codes"), (".", None, "manifest"),
    ):  # fmt: skip
        if array is not None:
            np.save(tmp_path / name, array)
        with pytest.raises(DataError, match=message):
            run(trained, tmp_path / name, tmp_path / "images")
