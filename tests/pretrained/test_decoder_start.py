import json
import re

import jax
import numpy as np
import pytest

from vqrae_jax.build.tokenizer import build_tokenizer, inline_decoder, variable_shapes
from vqrae_jax.config import ModelConfig
from vqrae_jax.errors import WeightsError
from vqrae_jax.inference import saving
from vqrae_jax.pretrained import convert
from vqrae_jax.pretrained.tables import DECODER_TABLE


def config(golden, path, **changes):
    return ModelConfig(**{
        "encoder_config_path": str(golden / "encoders" / "dinov2_with_registers"), "encoder_input_size": 56,
        "decoder_config_path": str(golden / "vqrae" / "decoder_config"), "decoder_patch_size": 16,
        "pretrained_decoder_path": str(path), **changes,
    })  # fmt: skip


@pytest.fixture
def model_file(golden):
    return golden / "vqrae" / "ema_vq_2d" / "model.npz"


@pytest.fixture
def decoder(model_file):
    """The decoder's state dict, as in releases."""
    return {n.removeprefix("decoder."): x for n, x in np.load(model_file).items() if n.startswith("decoder.")}


def test_release_or_whole_model(golden, tmp_path, model_file, decoder, assert_same):
    np.savez(tmp_path / "decoder.npz", **decoder)
    np.savez(tmp_path / "wrapped.npz", **{f"decoder._orig_mod.{name}": x for name, x in decoder.items()})
    for path in (tmp_path / "decoder.npz", tmp_path / "wrapped.npz", model_file):
        read = build_tokenizer(config(golden, path)).pretrained["decoder"]
        assert_same(read, convert.convert(decoder, DECODER_TABLE, read))
        np.testing.assert_array_equal(read["embed"]["kernel"], decoder["decoder_embed.weight"].T)


def test_a_decoder_without_biases_of_its_projections(golden, tmp_path, decoder):
    names = {n for n in decoder if re.search(r"attention\.(query|key|value)\.bias", n)}
    np.savez(tmp_path / "decoder.npz", **{n: x for n, x in decoder.items() if n not in names})
    described = json.loads((golden / "vqrae" / "decoder_config" / "config.json").read_text()) | {"qkv_bias": False}
    (tmp_path / "config.json").write_text(json.dumps(described))
    model = config(golden, tmp_path / "decoder.npz", decoder_config_path=str(tmp_path))
    read = build_tokenizer(model).pretrained["decoder"]
    assert set(read["blocks"]["attn"]["query"]) == {"kernel"}
    assert len(names) == 3 * described["decoder_num_hidden_layers"]
    assert inline_decoder(model).decoder_architecture["qkv_bias"] is False


def test_a_head_of_features_starts_random(golden, model_file):
    """With one linear layer as with blocks, whose norms start as the identity."""
    for blocks in (0, 2):
        built = build_tokenizer(config(golden, model_file, decoder_features=(0,), decoder_feature_blocks=blocks))
        head, shapes = built.pretrained["decoder"]["features"], variable_shapes(built)["params"]["decoder"]["features"]
        assert jax.tree.map(lambda x: (x.shape, x.dtype), head) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
        kernel = head["head"]["kernel"] if blocks else head["kernel"]
        np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.1)
    np.testing.assert_array_equal(head["norm"]["scale"], 1)


def test_exported_folder(golden, tmp_path, model_file, assert_same):
    """A VQRAE starts from a continuous autoencoder of ours."""
    continuous = config(golden, model_file, quantizer="none")
    decoder = build_tokenizer(continuous).pretrained["decoder"]
    saving.save_folder(tmp_path, continuous, {"params": {"decoder": decoder}, "batch_stats": {}}, frozen=False)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert_same(build_tokenizer(config(golden, path)).pretrained["decoder"], decoder)


def test_pytorch_training_checkpoint(golden, tmp_path, model_file):
    torch = pytest.importorskip("torch", reason="PyTorch files need PyTorch")
    state = {name: torch.from_numpy(array) for name, array in np.load(model_file).items()}
    ema = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"step": 1, "model": state, "ema": ema, "optimizer": None}, tmp_path / "step.pt")
    lightning = {f"model.{name}": tensor for name, tensor in ema.items()}
    torch.save({"epoch": 1, "state_dict": lightning, "optimizer_states": []}, tmp_path / "lightning.ckpt")
    for name in ("step.pt", "lightning.ckpt"):
        read = build_tokenizer(config(golden, tmp_path / name)).pretrained["decoder"]
        np.testing.assert_array_equal(read["cls"], ema["decoder.trainable_cls_token"].numpy())


def test_every_shape_mismatch_is_listed_and_an_encoder_file_is_recognized(golden, model_file):
    """Another patch size changes the last layer, another grid the position table, and nothing else."""
    with pytest.raises(WeightsError) as caught:
        build_tokenizer(config(golden, model_file, decoder_patch_size=8, encoder_input_size=70))
    message = str(caught.value)
    for text in (
        str(model_file), "shape mismatch (3)",
        "decoder_pred.weight ((768, 40) in the file, (192, 40) expected for pred/kernel)",
        "decoder_pred.bias ((768,) in the file, (192,) expected for pred/bias)",
        "decoder_pos_embed ((1, 17, 40) in the file, (1, 26, 40) expected for pos_embed)",
    ):  # fmt: skip
        assert text in message
    assert not re.search(r"missing|unexpected", message)
    with pytest.raises(WeightsError, match="Dinov3withNorm"):
        build_tokenizer(config(golden, golden / "encoders" / "dinov3" / "model.safetensors"))
