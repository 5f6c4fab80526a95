"""Damaged, hostile and unknown files: the readers raise WeightsError and nothing else."""

import io
import json
import os
import pickle
import sys
import zipfile

import flax.serialization
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vqrae_jax import storage
from vqrae_jax.errors import WeightsError
from vqrae_jax.evaluation import reference
from vqrae_jax.pretrained import convert, families, readers, sources
from vqrae_jax.pretrained.tables import DECODER_TABLE

RNG = np.random.default_rng(0)
TENSORS = {
    "decoder_embed.weight": RNG.standard_normal((4, 3)).astype(np.float32),
    "decoder_embed.bias": RNG.standard_normal(4).astype(np.float32),
    "trainable_cls_token": RNG.standard_normal((1, 1, 4)).astype(np.float32),
}
TARGET = {
    "embed": {"kernel": jax.ShapeDtypeStruct((3, 4), np.float32), "bias": jax.ShapeDtypeStruct((4,), np.float32)},
    "cls": jax.ShapeDtypeStruct((1, 1, 4), np.float32),
}
FORMATS = [".safetensors", ".npz", ".msgpack", ".pt"]


def serialize(suffix, tensors=TENSORS):
    """Returns tensors as the content of a file of this format."""
    if suffix == ".safetensors":
        return safetensors.numpy.save(tensors)
    if suffix == ".msgpack":
        embed = {"kernel": tensors["decoder_embed.weight"].T, "bias": tensors["decoder_embed.bias"]}
        tree = {"decoder_embed": embed, "trainable_cls_token": tensors["trainable_cls_token"]}
        return flax.serialization.msgpack_serialize(tree)
    buffer = io.BytesIO()
    if suffix == ".npz":
        np.savez(buffer, **tensors)
    else:
        torch = pytest.importorskip("torch", reason="PyTorch files need PyTorch")
        dtypes = {name: getattr(torch, x.dtype.name) for name, x in tensors.items()}
        torch.save({n: torch.tensor(x.astype(np.float32), dtype=dtypes[n]) for n, x in tensors.items()}, buffer)
    return buffer.getvalue()


def load(file):
    return convert.convert(readers.read_tensors(file, "the field"), DECODER_TABLE, TARGET, source=str(file))


def test_files_that_unpack_to_far_more_than_their_size_are_refused(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="PyTorch files need PyTorch")
    zeros = np.zeros((1000, 1000), np.float32)
    np.savez_compressed(tmp_path / "bomb.npz", mean=zeros, mu=np.zeros(3), sigma=np.zeros((3, 3)))
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data/0", zeros.tobytes())
    torch.save({"mean": torch.zeros(1).expand(1000, 1000)}, tmp_path / "repeated.pt")
    readers.read_tensors(tmp_path / "bomb.npz", "the field")  # a megabyte is harmless
    monkeypatch.setattr(storage, "_UNPACKED", 1e6)
    monkeypatch.setattr(readers, "_MAX_REPEATED", 1e6)
    for name in ("bomb.npz", "bomb.pt", "repeated.pt"):
        with pytest.raises(WeightsError, match=r"4000|repeats") as error:
            sources.read_latent_statistics(str(tmp_path / name), "the field", (1, 1, 1000))
        assert error.value.field == "the field"
    with pytest.raises(WeightsError, match="unpacks"):
        reference.read_reference(tmp_path / "bomb.npz", {"encoder": 3}, "the field", {})


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_reads_the_same(tmp_path, suffix):
    file = tmp_path / f"weights{suffix}"
    file.write_bytes(serialize(suffix))
    tree = load(file)
    np.testing.assert_array_equal(tree["embed"]["kernel"], TENSORS["decoder_embed.weight"].T)
    np.testing.assert_array_equal(tree["cls"], TENSORS["trainable_cls_token"])


@pytest.mark.parametrize("suffix", FORMATS)
def test_nan_and_infinity_are_refused(tmp_path, suffix):
    """A single one, in float32 and half precision, with the file and the tensor."""
    file = tmp_path / f"weights{suffix}"
    for dtype in (np.float32, np.float16 if suffix == ".npz" else ml_dtypes.bfloat16):
        for name, value in zip(TENSORS, (np.nan, np.inf, -np.inf), strict=True):
            tensors = {n: x.astype(dtype) for n, x in TENSORS.items()}
            file.write_bytes(serialize(suffix, tensors))
            load(file)
            tensors[name].flat[-1] = value
            file.write_bytes(serialize(suffix, tensors))
            message, _ = message_or_result(lambda: load(file))
            assert str(file) in message
            assert name in message
            assert len(message.splitlines()) == 1


def message_or_result(read):
    """Returns (message, None) if `read` raises a WeightsError, otherwise (None, result)."""
    try:
        return None, read()
    except WeightsError as error:
        return str(error), None


damage = st.one_of(
    st.tuples(st.just("cut"), st.floats(0, 1)),
    st.tuples(st.just("flip"), st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=6)),
)


def damaged(content, kind, how):
    if kind == "cut":
        return content[: int(how * (len(content) - 1))]
    content = bytearray(content)
    for position, change in how:
        content[int(position * (len(content) - 1))] ^= change
    return bytes(content)


@pytest.mark.parametrize("suffix", FORMATS)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=damage)
def test_damaged_file_is_named(tmp_path, suffix, damage):
    file = tmp_path / f"weights{suffix}"
    file.write_bytes(damaged(serialize(suffix), *damage))
    message, tree = message_or_result(lambda: load(file))
    if message is None:  # a flipped bit in a weight is not detectable
        assert jax.tree.map(np.shape, tree) == jax.tree.map(lambda leaf: leaf.shape, TARGET)
    else:
        assert str(file) in message


@pytest.mark.parametrize("case", ["dinov2_with_registers", "dinov3", "siglip", "vit_mae"])
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=damage)
def test_damaged_descriptions(golden, tmp_path, case, damage):
    folder = golden / "encoders" / case
    cls = json.loads((folder / "params.json").read_text())["encoder_cls"]
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes(damaged((folder / name).read_bytes(), *damage))

    def describe():
        config = sources.read_config(tmp_path, "the field")
        families.describe(families.FAMILIES[cls], config, str(tmp_path))
        sources.read_image_statistics(tmp_path, "the field")

    message, _ = message_or_result(describe)
    assert message is None or str(tmp_path) in message


class Hostile:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_runs_code_is_refused(tmp_path, suffix, zipped):
    torch = pytest.importorskip("torch", reason="PyTorch files need PyTorch")
    marker, file = tmp_path / "ran", tmp_path / f"hostile{suffix}"
    torch.save({"model": Hostile(marker)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match="hostile") as caught:
        readers.read_tensors(file, "model.pretrained_decoder_path")
    assert "weights_only" not in str(caught.value)  # PyTorch's own message suggests to run the code
    assert str(file) in str(caught.value)
    assert caught.value.field == "model.pretrained_decoder_path"
    assert not marker.exists()


def test_pickles_in_other_formats_are_refused(tmp_path):
    marker, file = tmp_path / "ran", tmp_path / "hostile.npz"
    np.savez(file, weights=np.array([Hostile(marker)], dtype=object))
    for suffix in (".safetensors", ".bare.npz", ".msgpack"):
        (tmp_path / f"hostile{suffix}").write_bytes(pickle.dumps(Hostile(marker)))
    for path in tmp_path.iterdir():
        with pytest.raises(WeightsError, match="hostile"):
            readers.read_tensors(path, "the field")
    assert not marker.exists()
    with zipfile.ZipFile(file) as archive, archive.open("weights.npy") as member:  # numpy would run it
        np.lib.format.read_array(member, allow_pickle=True)
    assert marker.exists()


def test_unknown_format_absent_file_and_missing_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "weights.pt").write_bytes(b"")
    for name, message in (
        ("weights.h5", r"h5.*\.safetensors, \.npz, \.msgpack, \.pt"), ("weights.npz", r"the field: .*weights\.npz"),
        ("weights.pt", r"weights\.pt.*vqrae-jax\[torch\]"),
    ):  # fmt: skip
        with pytest.raises(WeightsError, match=message):
            readers.read_tensors(tmp_path / name, "the field")


def test_all_mismatches_are_listed():
    wrong = {"decoder_embed.weight": np.zeros((3, 4)), "decoder_embed.bias": np.zeros(4), "unknown.name": np.zeros(1)}
    with pytest.raises(WeightsError) as caught:
        convert.convert(wrong, DECODER_TABLE, TARGET, source="some file")
    for text in (
        "some file", "decoder_embed.weight ((3, 4) in the file, (4, 3) expected for embed/kernel)",  # transposed
        "missing (1): cls", "unexpected (1): unknown.name",
    ):  # fmt: skip
        assert text in str(caught.value)
