import json

import jax
import numpy as np
import pytest

from vqrae_jax.commands import import_pytorch
from vqrae_jax.config import ModelConfig, load_config_file
from vqrae_jax.errors import ConfigError, WeightsError
from vqrae_jax.inference.pytorch_checkpoint import convert_checkpoint
from vqrae_jax.inference.tokenizer import Tokenizer
from vqrae_jax.pretrained.pytorch_vqrae import select_state_dict


@pytest.fixture
def case(golden):
    return golden / "vqrae" / "ema_vq_2d"


@pytest.fixture
def config(golden, case, tmp_path):
    """The YAML file of the golden case."""
    params = json.loads((case / "params.json").read_text())["params"]
    paths = {name: str(golden / params[name]) for name in ("encoder_config_path", "decoder_config_path")}
    paths["encoder_params"] = {"dinov2_path": paths["encoder_config_path"]}
    params |= paths | {"normalization_stat_path": str(case / "stat.npz"), "eps": 1e-3}
    file = tmp_path / "case.yaml"
    content = {"stage_1": {"target": "stage1.VQRAE", "params": params}, "training": {"epochs": 3, "num_workers": 8}}
    file.write_text(json.dumps(content))
    return file


@pytest.fixture
def model_config(config):
    return import_pytorch.read_config(str(config)).config.model


@pytest.fixture
def tensors(case):
    return dict(np.load(case / "model.npz"))


def run(*arguments):
    return import_pytorch.import_pytorch(import_pytorch.parser.parse_args([str(argument) for argument in arguments]))


def test_an_imported_tokenizer_equals_the_pytorch_vqrae(case, config, tmp_path, assert_close, capsys):
    folder = run(f"--checkpoint={case / 'model.npz'}", f"--config={config}", f"--output={tmp_path / 'out'}")
    tokenizer, io = Tokenizer.load(folder, fit="model"), np.load(case / "io.npz")
    for name in ("main", "native", "other"):
        np.testing.assert_array_equal(tokenizer.encode_to_indices(io[f"images_{name}"]), io[f"indices_{name}"])
    assert_close(tokenizer.decode_from_indices(io["indices_main"]), np.clip(io["recon_main"], 0, 1), 1e-5)
    # Recorded with another eps, which cancels in reconstructions, like the statistics.
    variance = tokenizer.variables["batch_stats"]["latent"]["var"]
    np.testing.assert_allclose(variance, np.load(case / "stat.npz")["var"] + (1e-3 - 1e-5), rtol=1e-6)
    # The config that trains as the YAML file says, for images of the decoder's size; what it cannot say is printed.
    trains = load_config_file(str(folder / "train.py"))
    assert (trains.train.epochs, trains.data.image_size, trains.optimizer.ema_warmup) == (3, 64, False)
    assert {"training.num_workers", "training.batch_size"} <= {
        n.split(":")[0] for n in capsys.readouterr().out.splitlines()
    }
    # The encoder is in the folder, because it need not be the one of the hub any more.
    assert json.loads((folder / "config.json").read_text())["encoder"] is None


def test_a_released_decoder_becomes_a_continuous_autoencoder(config, tensors, tmp_path, assert_same, capsys):
    """With the encoder, which stays outside of the folder, and the statistics that the config names."""
    file, whole = tmp_path / "decoder.npz", tmp_path / "whole.npz"
    np.savez(file, **{name.removeprefix("decoder."): x for name, x in tensors.items() if name.startswith("decoder.")})
    np.savez(whole, **tensors)
    folder = run(f"--checkpoint={file}", f"--config={config}", f"--output={tmp_path / 'out'}")
    assert "fit-codebook" in capsys.readouterr().out
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.has_codes, tokenizer.frozen) == (False, True)
    expected = Tokenizer.load(run(f"--checkpoint={whole}", f"--config={config}", f"--output={tmp_path / 'whole'}"))
    assert_same(tokenizer.trained["params"]["decoder"], expected.trained["params"]["decoder"])
    assert_same(tokenizer.trained["batch_stats"]["latent"], expected.trained["batch_stats"]["latent"])
    trains = load_config_file(str(folder / "train.py"))
    assert (trains.model.quantizer, trains.model.pretrained_decoder_path) == ("ema", str(file))
    # The config may name the decoder itself.
    model = tmp_path / "model.json"
    model.write_text(ModelConfig(**trains.model.to_dict()).model_dump_json().join(('{"model": ', "}")))
    again = run(f"--config={model}", f"--output={tmp_path / 'again'}")
    assert_same(Tokenizer.load(again).trained["params"], tokenizer.trained["params"])
    model.write_text("{}")
    for arguments in ([], [f"--config={model}"]):
        with pytest.raises(ConfigError) as error:
            run(*arguments, f"--output={tmp_path / 'absent'}")
        assert error.value.field == "--checkpoint"


def test_a_decoder_has_averaged_weights_or_those_of_the_model(config, tensors, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch files need PyTorch")
    names = [name for name in tensors if name.startswith("decoder.")]
    decoder = {name.removeprefix("decoder."): torch.from_numpy(tensors[name]) for name in names}
    torch.save({"model": decoder}, tmp_path / "model.pt")
    torch.save({"model": decoder, "ema": decoder}, tmp_path / "both.pt")
    files = f"--config={config}", f"--output={tmp_path / 'out'}", "--weights=model"
    assert not Tokenizer.load(run(f"--checkpoint={tmp_path / 'model.pt'}", *files)).has_codes
    with pytest.raises(ConfigError) as error:
        run(f"--checkpoint={tmp_path / 'both.pt'}", *files)
    assert error.value.field == "--weights"


def test_a_training_checkpoint_in_pytorchs_own_format(case, config, tensors, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch files need PyTorch")
    parts = {"model": tensors, "ema": tensors | dict(np.load(case / "ema.npz"))}
    states = {name: {n: torch.from_numpy(t) for n, t in part.items()} for name, part in parts.items()}
    torch.save({"step": 7, "epoch": 1, **states, "optimizer": None}, tmp_path / "0000007.pt")
    imported = {}
    for weights in ("model", "ema"):
        files = f"--checkpoint={tmp_path / '0000007.pt'}", f"--config={config}", f"--output={tmp_path / weights}"
        imported[weights] = Tokenizer.load(run(*files, f"--weights={weights}")).variables
    jax.tree.map(np.testing.assert_array_equal, imported["model"]["batch_stats"], imported["ema"]["batch_stats"])
    kernels = [np.asarray(variables["params"]["decoder"]["embed"]["kernel"]) for variables in imported.values()]
    assert np.abs(kernels[0] - kernels[1]).max() > 0


def test_the_codebook_is_that_of_pytorchs_inference_unless_it_never_trained():
    live, codebook = {"quantizer.embedding": 3.0, "quantizer.ema_cluster_size": 2.0, "quantizer.ema_w": 6.0}, {}
    for counts in (0.0, 1.5):  # of trainers that average parameters only, and of those that average buffers
        averaged = {"quantizer.embedding": 1.0, "quantizer.ema_cluster_size": counts, "quantizer.ema_w": 1.5}
        for prefix in ("", "module."):
            parts = {
                part: {prefix + name: np.full(4, value) for name, value in buffers.items()}
                for part, buffers in (("model", live), ("ema", averaged))
            }
            codebook[counts, prefix] = select_state_dict(parts, "ema", "the file")["quantizer.embedding"][0]
    assert codebook == {(0.0, ""): 3.0, (0.0, "module."): 3.0, (1.5, ""): 1.0, (1.5, "module."): 1.0}


def test_checkpoints_that_do_not_fit_are_errors(model_config, tensors):
    other = model_config.model_copy(update={"num_embeddings": 65})
    for config, checkpoint, message in (
        (model_config, {"model": tensors}, r"--weights='ema'.*'model'"),
        (model_config, {"state": {"a": np.zeros(1)}}, "state"),
        (other, tensors, r"\(64, 32\).*\(65, 32\)"),
    ):
        with pytest.raises(WeightsError, match=message):
            convert_checkpoint(config, checkpoint, "ema")


def test_a_state_dict_saved_through_a_wrapper(model_config, tensors):
    _, expected = convert_checkpoint(model_config, tensors)
    # DistributedDataParallel, torch.compile and FSDP, around the model, in any order, and around its parts
    for outer, inner in (("module.", ""), ("_orig_mod.module.", ""), ("module._orig_mod.", "_fsdp_wrapped_module."),
                         ("", "_orig_mod.")):  # fmt: skip
        wrapped = {outer + name.replace("decoder.", "decoder." + inner, 1): x for name, x in tensors.items()}
        for checkpoint in (wrapped, {"model": wrapped, "ema": wrapped}):
            _, variables = convert_checkpoint(model_config, checkpoint)
            jax.tree.map(np.testing.assert_array_equal, variables, expected)
    # PyTorch Lightning, around a model and the networks of its loss
    states = {f"model.{name}": x for name, x in tensors.items()} | {"loss.head.weight": np.zeros(3, np.float32)}
    _, variables = convert_checkpoint(model_config, {"state_dict": states, "epoch": 1, "optimizer_states": [{}]})
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    with pytest.raises(WeightsError, match=r"module\.decoder\.decoder_norm\.bias"):
        convert_checkpoint(model_config, tensors | {"module.decoder.decoder_norm.bias": np.zeros(40, np.float32)})


def test_errors_of_the_model_name_the_key_of_the_config(case, config, tmp_path):
    content = json.loads(config.read_text())
    content["stage_1"]["params"]["encoder_input_size"] = 57
    config.write_text(json.dumps(content))
    with pytest.raises(ConfigError) as error:
        run(f"--checkpoint={case / 'model.npz'}", f"--config={config}", f"--output={tmp_path / 'out'}")
    assert (error.value.field, error.value.value) == ("stage_1.params.encoder_input_size", 57)
    assert "model.encoder_input_size" in error.value.message


def test_config_files(tmp_path):
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "whole.json").write_text('{"model": {"num_embeddings": 3}}')
    body = "c = config.defaults(); c.model.vq_decay = 0.5; return c"
    (tmp_path / "ours.py").write_text(f"from vqrae_jax import config\ndef get_config(): {body}\n")
    assert import_pytorch.read_config(str(tmp_path / "whole.json")).config.model.num_embeddings == 3
    assert import_pytorch.read_config(str(tmp_path / "ours.py")).config.model.vq_decay == 0.5
    for name in (tmp_path / "missing.py", tmp_path / "missing.yaml", tmp_path / "empty.py", f"{tmp_path}/ours.py:512"):
        with pytest.raises(ConfigError, match=str(name).partition(":")[0]):
            import_pytorch.read_config(str(name))
