"""Training starts from a decoder that someone else trained."""

import re

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vqrae_jax.build.tokenizer import build_tokenizer
from vqrae_jax.config import ModelConfig
from vqrae_jax.errors import WeightsError
from vqrae_jax.inference import saving as folder
from vqrae_jax.models.stacking import unstack_blocks
from vqrae_jax.pretrained import convert
from vqrae_jax.pretrained.tables import DECODER_TABLE


def config(golden, path, **changes):
    return ModelConfig(**{
        "encoder_config_path": str(golden / "encoders" / "dinov2_with_registers"), "encoder_input_size": 56,
        "decoder_config_path": str(golden / "vqrae" / "decoder_config"), "decoder_patch_size": 16,
        "pretrained_decoder_path": str(path), "scan_layers": False, **changes,
    })  # fmt: skip


@pytest.fixture
def whole(golden):
    return golden / "vqrae" / "ema_vq_2d" / "model.npz"


@pytest.fixture
def decoder(whole):
    """The decoder's own state dict, as releases have it."""
    state = dict(np.load(whole))
    return {name.removeprefix("decoder."): state[name] for name in state if name.startswith("decoder.")}


def assert_same(a, b):
    a, b = (flatten_dict(tree, sep="/") for tree in (a, b))
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("bare", [False, True])
def test_from_a_release_or_a_whole_model(golden, tmp_path, whole, decoder, bare, scan):
    path = tmp_path / "decoder.npz" if bare else whole
    if bare:
        np.savez(path, **decoder)
    read = build_tokenizer(config(golden, path, scan_layers=scan)).pretrained["decoder"]
    read = unstack_blocks(read) if scan else read
    assert_same(read, convert.convert(decoder, DECODER_TABLE, read))
    np.testing.assert_array_equal(read["embed"]["kernel"], decoder["decoder_embed.weight"].T)


@pytest.mark.parametrize("scanned", [False, True])
def test_from_a_folder_that_we_exported(golden, tmp_path, whole, scanned):
    """A VQRAE starts from the continuous autoencoder trained here, whichever way either keeps its blocks."""
    continuous = config(golden, whole, quantizer="none", scan_layers=scanned)
    decoder = build_tokenizer(continuous).pretrained["decoder"]
    folder.write(tmp_path, continuous, {"params": {"decoder": decoder}, "batch_stats": {}}, frozen=False)
    expected = unstack_blocks(decoder) if scanned else decoder
    assert_same(build_tokenizer(config(golden, tmp_path)).pretrained["decoder"], expected)
    scanning = build_tokenizer(config(golden, tmp_path / "model.safetensors", scan_layers=True)).pretrained["decoder"]
    assert_same(unstack_blocks(scanning), expected)


def test_from_a_training_checkpoint_in_pytorchs_own_file(golden, tmp_path, whole):
    torch = pytest.importorskip("torch", reason="PyTorch files need PyTorch")
    state = {name: torch.from_numpy(array) for name, array in np.load(whole).items()}
    ema = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"step": 1, "model": state, "ema": ema, "optimizer": None}, tmp_path / "step.pt")
    read = build_tokenizer(config(golden, tmp_path / "step.pt")).pretrained["decoder"]
    np.testing.assert_array_equal(read["cls"], ema["decoder.trainable_cls_token"].numpy())


def test_a_size_mismatch_is_told_leaf_by_leaf(golden, whole):
    """Another patch size asks for another last layer, another grid for another position table; nothing else differs."""
    with pytest.raises(WeightsError) as caught:
        build_tokenizer(config(golden, whole, decoder_patch_size=8, encoder_input_size=70))
    message = str(caught.value)
    assert str(whole) in message
    assert "of another size (3)" in message
    for text in (
        "decoder_pred.weight ((768, 40) in the file, (192, 40) expected for pred/kernel)",
        "decoder_pred.bias ((768,) in the file, (192,) expected for pred/bias)",
        "decoder_pos_embed ((1, 17, 40) in the file, (1, 26, 40) expected for pos_embed)",
    ):
        assert text in message
    assert not re.search(r"missing|unexpected", message)


def test_an_encoder_is_no_decoder(golden):
    path = golden / "encoders" / "dinov3" / "model.safetensors"
    with pytest.raises(WeightsError, match="by its names it looks like Dinov3withNorm"):
        build_tokenizer(config(golden, path))


def test_the_assembly_paints_with_it(golden, whole, assert_close):
    built = build_tokenizer(config(golden, whole))
    latent = np.random.default_rng(0).standard_normal((1, 4, 4, 32)).astype(np.float32)
    painted = jax.jit(built.module.decoder.apply)({"params": built.pretrained["decoder"]}, latent)
    assert painted.shape == (1, 64, 64, 3)
    assert np.isfinite(painted).all()
