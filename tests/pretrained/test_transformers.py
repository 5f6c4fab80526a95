"""Encoders that transformers saves, with heads, wrappers and options of every kind, have the same features here."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax.build.encoder import build_encoder
from vqrae_jax.config import ModelConfig
from vqrae_jax.errors import WeightsError
from vqrae_jax.models.layers import ACTIVATIONS
from vqrae_jax.pretrained import families

torch = pytest.importorskip("torch", reason="PyTorch files need PyTorch")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SMALL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
# transformers' class without "ForImageClassification", our family, wrappers around the names, shards, options
CASES = {
    "Dinov2ForImageClassification": ("Dinov2withNorm", "", 1, {"hidden_act": "gelu_new"}),
    "Dinov2WithRegistersForImageClassification": (
        "Dinov2withNorm", "module._orig_mod.", 2,
        {"num_register_tokens": 0, "qkv_bias": False, "use_swiglu_ffn": True, "hidden_act": "mish"},
    ),
    "DINOv3ViTModel": (
        "Dinov3withNorm", "encoder._orig_mod.", 1,
        {"mlp_bias": False, "proj_bias": False, "value_bias": False, "key_bias": True, "use_gated_mlp": True},
    ),
    "ViTForImageClassification": (
        "MAEwNorm", "model._orig_mod.module.", 3, {"qkv_bias": False, "hidden_act": "quick_gelu"},
    ),
    "ViTModel": ("MAEwNorm", "", 1, {"hidden_act": "relu"}),
    "SiglipForImageClassification": ("SigLIP2wNorm", "", 2, {"hidden_act": "swish"}),
}  # fmt: skip


def save(model, folder, prefix="", shards=1):
    """Writes a hub folder with pytorch_model.bin or its shards."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    tensors = {prefix + name: tensor.clone() for name, tensor in model.state_dict().items()}
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    files = {n: f"pytorch_model-{i % shards + 1:05d}-of-{shards:05d}.bin" for i, n in enumerate(tensors)}
    for file in set(files.values()):
        torch.save({n: t for n, t in tensors.items() if files[n] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def build(folder, family):
    config = ModelConfig(
        encoder_cls=family, encoder_config_path=str(folder), encoder_input_size=28, encoder_params={"normalize": False}
    )
    return build_encoder(config)


def create(name, options):
    kind = getattr(transformers, name)
    config = kind.config_class(**SMALL, **options) if "Siglip" not in name else kind.config_class()
    if "Siglip" in name:
        config = kind.config_class(
            vision_config=transformers.SiglipVisionConfig(**SMALL, **options).to_dict(),
            text_config=transformers.SiglipTextConfig(**SMALL, vocab_size=8, max_position_embeddings=4).to_dict(),
        )
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("name", CASES)
def test_features_equal_transformers(tmp_path, assert_close, name):
    family, prefix, shards, options = CASES[name]
    model = create(name, options)
    images = np.random.default_rng(0).uniform(size=(2, 28, 28, 3)).astype(np.float32)
    trunk = model.base_model if hasattr(model, "classifier") else model
    trunk = getattr(trunk, "vision_model", trunk)
    with torch.no_grad():
        tokens = trunk(torch.from_numpy(images).permute(0, 3, 1, 2)).last_hidden_state
    encoder, params = build(save(model, tmp_path / "folder", prefix, shards), family)
    features = jax.jit(encoder.apply)({"params": params}, images)
    assert_close(features, tokens[:, -4:].numpy().reshape(features.shape), 2e-5)


def test_activations_equal_transformers(assert_close):
    x = np.linspace(-6, 8, 57, dtype=np.float32)
    for name, ours in families.ACTIVATIONS.items():
        expected = transformers.activations.ACT2FN[name](torch.from_numpy(x)).numpy()
        assert_close(ACTIVATIONS[ours](jnp.asarray(x)), expected, 1e-5, name)
    with pytest.raises(WeightsError):
        families.activation({"hidden_act": "xielu"})


def test_two_encoders_in_one_file_and_unknown_tensors_are_named(tmp_path):
    model = create("Dinov2Model", {})
    folder = save(model, tmp_path / "two", "student.")
    student = torch.load(folder / "pytorch_model.bin")
    teacher = {n.replace("student", "teacher"): t for n, t in student.items()}
    for extra in (teacher, {"student.adapter.weight": torch.zeros(1)}):
        torch.save(student | extra, folder / "pytorch_model.bin")
        with pytest.raises(WeightsError, match=next(iter(extra))):
            build(folder, "Dinov2withNorm")
    torch.save(student | {"n_averaged": torch.ones(())}, folder / "pytorch_model.bin")  # as AveragedModel saves it
    build(folder, "Dinov2withNorm")
    torch.save(student | {"student.module.layernorm.bias": torch.zeros(16)}, folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"student\.module\.layernorm\.bias"):
        build(folder, "Dinov2withNorm")
