import jax
import pytest

from vqrae_jax import config


@pytest.fixture(scope="session")
def tiny(golden):
    """A run that trains in seconds: 32 x 32 pictures, 4 x 4 codes, everything trained."""

    def build(**sections):
        values = {
            "model": {
                "encoder_config_path": None,
                "encoder_params": {"architecture": {
                    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8, "image_size": 32,
                }},
                "encoder_input_size": 32,
                "decoder_config_path": str(golden / "vqrae" / "decoder_config"),
                "decoder_patch_size": 8,
                "num_embeddings": 32,
            },
            "data": {"source": "photographs", "image_size": 32, "scale": (2, 8), "batch_size": 8, "eval_batch_size": 64},
            "optimizer": {"warmup_steps": 2, "clip_norm": 1.0},
            "train": {"steps": 6, "log_every": 2, "evaluate_every": 6, "checkpoint_every": 3,
                      "trainable": ("encoder", "quantizer", "decoder")},
        }  # fmt: skip
        for section, fields in sections.items():
            values.setdefault(section, {}).update(fields)
        return config.from_dict(config.Config, values)

    return build


@pytest.fixture
def one_device():
    return jax.devices()[:1]
