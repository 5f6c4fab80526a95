"""A checkpoint of the PyTorch VQRAE becomes a tokenizer by one command."""

import json

import jax
import numpy as np
import pytest

from vqrae_jax.commands import import_pytorch
from vqrae_jax.errors import ConfigError, WeightsError
from vqrae_jax.inference import pytorch_checkpoint
from vqrae_jax.inference.tokenizer import Tokenizer


@pytest.fixture
def config(golden, tmp_path):
    """The config of the golden case ema_vq_2d, as a file of configs/ would have it."""
    file = tmp_path / "case.py"
    lines = {
        "encoder_config_path": str(golden / "encoders" / "dinov2_with_registers"), "encoder_input_size": 56,
        "decoder_config_path": str(golden / "vqrae" / "decoder_config"), "num_embeddings": 64,
        "normalization_stat_path": str(golden / "vqrae" / "ema_vq_2d" / "stat.npz"),
    }  # fmt: skip
    body = "".join(f"    c.model.{name} = {value!r}\n" for name, value in lines.items())
    file.write_text(
        f"from vqrae_jax import config\n\n\ndef get_config():\n    c = config.defaults()\n{body}    return c\n"
    )
    return file


def run(*arguments):
    return import_pytorch.run(import_pytorch.parse([str(argument) for argument in arguments]))


def test_imported_tokenizer_equals_pytorch(golden, config, tmp_path, assert_close):
    case = golden / "vqrae" / "ema_vq_2d"
    folder = run(f"--checkpoint={case / 'model.npz'}", f"--config={config}", f"--output={tmp_path / 'out'}")
    tokenizer, io = Tokenizer.load(folder, fit="model"), np.load(case / "io.npz")
    for name in ("main", "native", "other"):
        np.testing.assert_array_equal(tokenizer.encode_to_indices(io[f"images_{name}"]), io[f"indices_{name}"])
    expected = np.clip(io["recon_main"], 0, 1)
    assert_close(tokenizer.decode_from_indices(io["indices_main"]), expected, 1e-5)
    described = json.loads((folder / "config.json").read_text())
    assert described["encoder"] is None  # it is in the folder: nothing says that it still was the hub's


def test_training_checkpoint_in_pytorchs_own_file(golden, config, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch files need PyTorch")
    case = golden / "vqrae" / "ema_vq_2d"
    model = dict(np.load(case / "model.npz"))
    ema = model | dict(np.load(case / "ema.npz"))
    parts = {"model": model, "ema": ema}
    tensors = {name: {n: torch.from_numpy(t) for n, t in part.items()} for name, part in parts.items()}
    torch.save({"step": 7, "epoch": 1, **tensors, "optimizer": None}, tmp_path / "0000007.pt")
    built = {}
    for weights in ("model", "ema"):
        out = tmp_path / weights
        run(f"--checkpoint={tmp_path / '0000007.pt'}", f"--config={config}", f"--output={out}", f"--weights={weights}")
        built[weights] = Tokenizer.load(out).variables
    jax.tree.map(np.testing.assert_array_equal, built["model"]["batch_stats"], built["ema"]["batch_stats"])
    kernels = [np.asarray(v["params"]["decoder"]["embed"]["kernel"]) for v in built.values()]
    assert np.abs(kernels[0] - kernels[1]).max() > 0


def test_weights_that_are_not_there(golden, config, tmp_path):
    case = golden / "vqrae" / "ema_vq_2d"
    settings = import_pytorch.read_config(str(config))
    with pytest.raises(WeightsError, match=r"--weights='ema'.*'model'"):
        pytorch_checkpoint.convert_checkpoint(settings, {"model": dict(np.load(case / "model.npz"))}, "ema")
    with pytest.raises(WeightsError, match="state"):
        pytorch_checkpoint.convert_checkpoint(settings, {"state": {"a": np.zeros(1)}})


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod."])
def test_a_state_dict_saved_through_a_wrapper(golden, config, wrapper):
    """Of DistributedDataParallel, of torch.compile."""
    settings = import_pytorch.read_config(str(config))
    tensors = dict(np.load(golden / "vqrae" / "ema_vq_2d" / "model.npz"))
    _, expected = pytorch_checkpoint.convert_checkpoint(settings, tensors)
    _, variables = pytorch_checkpoint.convert_checkpoint(
        settings, {wrapper + name: value for name, value in tensors.items()}
    )
    jax.tree.map(np.testing.assert_array_equal, variables, expected)


def test_another_codebook_size(golden, config):
    settings = import_pytorch.read_config(str(config)).model_copy(update={"num_embeddings": 65})
    with pytest.raises(WeightsError, match=r"quantizer\.embedding \(\(64, 32\) in the file, \(65, 32\) expected"):
        pytorch_checkpoint.convert_checkpoint(
            settings, {"model": dict(np.load(golden / "vqrae" / "ema_vq_2d" / "model.npz"))}, "model"
        )


def test_config_files(config, tmp_path):
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "whole.json").write_text('{"model": {"num_embeddings": 3}}')
    assert import_pytorch.read_config(str(tmp_path / "whole.json")).num_embeddings == 3
    for name, reason in (
        (tmp_path / "none.py", "no .py or .json"),
        (tmp_path / "empty.py", "no function get_config"),
        (f"{config}:512", r"line 4: get_config takes no argument '512'"),
    ):
        with pytest.raises(ConfigError, match=reason):
            import_pytorch.read_config(str(name))
