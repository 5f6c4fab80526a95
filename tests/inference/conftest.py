import jax
import pytest

from vqrae_jax import Tokenizer
from vqrae_jax.build.tokenizer import build_tokenizer, initial_variables
from vqrae_jax.config import ModelConfig


@pytest.fixture(scope="session")
def untrained(golden):
    """Tokenizers on a small frozen encoder, nothing trained: 32 x 32 pictures, 4 x 4 codes of 24, by changed fields."""
    built = {}

    def build(**fields):
        key = tuple(sorted(fields.items()))
        if key not in built:
            config = ModelConfig(
                encoder_config_path=str(golden / "encoders" / "dinov2"), encoder_input_size=56, decoder_patch_size=8,
                decoder_config_path=str(golden / "vqrae" / "decoder_config"), num_embeddings=24, **fields,
            )  # fmt: skip
            model = build_tokenizer(config)
            variables = initial_variables(model, jax.random.key(0), ["encoder", "quantizer", "decoder"])
            built[key] = Tokenizer(model.module, variables, config, frozen=True)
        return built[key]

    return build
