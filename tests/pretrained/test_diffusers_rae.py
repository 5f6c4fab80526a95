"""Folders of diffusers' AutoencoderRAE compute what diffusers computes; see tests/golden/README.md."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from vqrae_jax.build.tokenizer import build_tokenizer
from vqrae_jax.commands import import_pytorch
from vqrae_jax.errors import ConfigError, WeightsError
from vqrae_jax.inference import saving
from vqrae_jax.inference.tokenizer import Tokenizer

CASES = ["dinov2", "siglip2", "mae"]


@pytest.fixture
def write(golden, tmp_path):
    """Writes the folder of a case; `changes` are those of its config.json, `tensors` more weights."""

    def write(case, changes=(), tensors=()):
        recorded = json.loads((golden / "diffusers_rae" / f"{case}.json").read_text())
        io, rng, state = np.load(golden / "diffusers_rae" / "io.npz"), np.random.default_rng(0), {}
        for name, shape in recorded["shapes"].items():
            if name.startswith(("encoder.", "decoder.")):
                mean = 1 if "norm" in name and name.endswith("weight") else 0
                state[name] = (rng.standard_normal(shape) * 0.1 + mean).astype(np.float32)
            else:
                state[name] = io[f"{case}/{name}"]
        folder = tmp_path / case
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(recorded["config"] | dict(changes)))
        safetensors.numpy.save_file(state | dict(tensors), folder / "diffusion_pytorch_model.safetensors")
        return folder, io[f"{case}/latent"], io[f"{case}/sample"]

    return write


@pytest.mark.parametrize("case", [CASES[0], *(pytest.param(n, marks=pytest.mark.slow) for n in CASES[1:])])
def test_latents_and_reconstructions_equal_diffusers(write, assert_close, case):
    folder, latent, sample = write(case)
    tokenizer = Tokenizer.load(folder, fit="model")
    images = np.random.default_rng(1).uniform(size=(1, 3, 40, 40)).astype(np.float32).transpose(0, 2, 3, 1)
    out = jax.jit(functools.partial(tokenizer.module.apply, method="forward"))(tokenizer.variables, images)
    expected = latent.transpose(0, 2, 3, 1) if latent.ndim == 4 else latent
    assert_close(out.latent, expected, 1e-5)
    assert_close(out.reconstruction, sample.transpose(0, 2, 3, 1), 1e-5)


def test_its_decoder_starts_another_model(write, golden, assert_same):
    folder, *_ = write("mae")
    model = saving.read_description(folder)[0].model_copy(update={"pretrained_decoder_path": str(folder)})
    decoder = Tokenizer.load(folder).variables["params"]["decoder"]
    assert_same(build_tokenizer(model).pretrained["decoder"], decoder)


def test_a_stored_position_table_is_used(write, caplog):
    """Early versions of diffusers stored it, and current ones ignore it."""
    table = np.random.default_rng(0).normal(size=(1, 5, 16)).astype(np.float32)
    folder, *_ = write("mae", tensors={"decoder.decoder_pos_embed": table})
    np.testing.assert_array_equal(Tokenizer.load(folder).variables["params"]["decoder"]["pos_embed"], table)
    assert "position table" in caplog.text


def test_it_is_saved_as_a_folder_of_ours(write, tmp_path, assert_same):
    folder, *_ = write("mae")
    tokenizer, outputs = Tokenizer.load(folder), [tmp_path / "saved", tmp_path / "imported"]
    tokenizer.save_pretrained(outputs[0])
    parse = import_pytorch.parser.parse_args
    import_pytorch.import_pytorch(parse([f"--checkpoint={folder}", f"--output={outputs[1]}"]))
    for output in outputs:
        assert json.loads((output / "config.json").read_text())["format"] == saving.FORMAT
        assert_same(Tokenizer.load(output).variables, tokenizer.variables)
    weights = folder / "diffusion_pytorch_model.safetensors"  # alone it does not describe itself
    with pytest.raises(ConfigError) as error:
        import_pytorch.import_pytorch(parse([f"--checkpoint={weights}", f"--output={tmp_path / 'none'}"]))
    assert error.value.field == "--config"


@pytest.mark.parametrize(
    ("changes", "tensors", "message"),
    [
        ({"encoder_type": "clip"}, {}, "encoder_type"), ({"patch_size": "4"}, {}, "patch_size is '4'"),
        ({"num_channels": 1}, {}, "3 channels"), ({"encoder_hidden_size": 32}, {}, "num_attention_heads"),
        ({"decoder_num_attention_heads": 0}, {}, "decoder_num_attention_heads"),
        ({}, {"decoder.adapter.weight": np.zeros(1, np.float32)}, r"decoder\.adapter\.weight"),
        ({}, {"_latents_mean": np.zeros(7, np.float32)}, "latent statistics"),
        ({}, {"_latents_std": np.full(1, np.nan, np.float32)}, "finite"),
        ({"decoder_num_hidden_layers": 3}, {}, "missing"),
    ],
)  # fmt: skip
def test_other_models_are_refused(write, changes, tensors, message):
    folder, *_ = write("mae", changes, tensors)
    with pytest.raises((WeightsError, ConfigError), match=message):
        Tokenizer.load(folder)
