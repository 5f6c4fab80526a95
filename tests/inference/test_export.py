import datetime
import json
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vqrae_jax.build.encoder import describe_encoder, inline_encoder
from vqrae_jax.build.tokenizer import build_tokenizer, inline_decoder, variable_shapes
from vqrae_jax.commands import export
from vqrae_jax.config import ModelConfig
from vqrae_jax.errors import CheckpointError, ConfigError, UserError, WeightsError
from vqrae_jax.inference import exported, pytorch_checkpoint, saving, stablehlo
from vqrae_jax.inference.location import locate
from vqrae_jax.inference.tokenizer import Tokenizer


def images(size=32, count=3):
    return np.random.default_rng(0).uniform(size=(count, size, size, 3)).astype(np.float32)


def run(trained, *arguments):
    return export.export(export.parser.parse_args([f"--checkpoint={trained}", *map(str, arguments)]))


def pretrained(golden, **changes):
    """A model on a frozen encoder of a hub folder, with random numbers for the rest; compiles nothing."""
    config = ModelConfig(**{
        "encoder_config_path": str(golden / "encoders" / "dinov2_with_registers"), "encoder_input_size": 56,
        "decoder_config_path": str(golden / "vqrae" / "decoder_config"), "decoder_patch_size": 8,
        "num_embeddings": 32, **changes,
    })  # fmt: skip
    built = build_tokenizer(config)
    rng = np.random.default_rng(0)
    shapes = variable_shapes(built)
    variables = jax.tree.map(lambda leaf: (0.1 * rng.standard_normal(leaf.shape)).astype(leaf.dtype), shapes)
    variables["params"]["encoder"] = built.pretrained["encoder"]
    return config, built.module, variables


def test_folder_equals_its_run(trained, tmp_path, assert_same):
    written = run(trained, "--format=safetensors", f"--output={tmp_path / 'out'}")
    assert [path.name for path in written] == ["config.json", "model.safetensors"]
    assert len({path.stat().st_mode for path in written}) == 1  # the same permissions
    run_tokenizer, saved = Tokenizer.load(trained), Tokenizer.load(tmp_path / "out")
    assert_same(run_tokenizer.variables, saved.variables)
    np.testing.assert_array_equal(run_tokenizer.encode_to_indices(images()), saved.encode_to_indices(images()))
    again = run(tmp_path / "out", "--format=safetensors", f"--output={tmp_path / 'again'}")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in written]


def test_folder_names_the_frozen_encoder(golden, tmp_path, assert_same):
    config, _, variables = pretrained(golden)
    path = saving.save_folder(tmp_path / "out", config, variables, frozen=True)
    content = json.loads((path / "config.json").read_text())
    assert content["encoder"]["source"] == config.encoder_config_path
    assert len(content["encoder"]["sha256"]) == 64
    size = (path / "model.safetensors").stat().st_size
    assert size < 1.05 * sum(x.nbytes for n in ("decoder",) for x in jax.tree.leaves(variables["params"][n])) + 2e4
    assert_same(Tokenizer.load(path).trained, variables)
    whole = saving.save_folder(tmp_path / "whole", config, variables, frozen=False)
    assert_same(Tokenizer.load(whole).trained, variables)
    tokenizer = Tokenizer.load(path)  # positions for 4 x 4 patches, not the 8 x 8 of the file
    assert tokenizer.variables["params"]["encoder"]["vit"]["pos_embed"].shape == (1, 1 + 4**2, 32)
    again = run(path, "--format=safetensors", f"--output={tmp_path / 'again'}")
    assert [file.read_bytes() for file in again] == [(path / file.name).read_bytes() for file in again]


@pytest.mark.parametrize("family", ["dinov2", "dinov3", "dinov3_gated", "dinov2_with_registers_swiglu", "siglip",
                                    "vit_mae"])  # fmt: skip
def test_architectures_replace_paths(golden, family):
    classes = {"dinov3": "Dinov3withNorm", "siglip": "SigLIP2wNorm", "vit_mae": "MAEwNorm"}
    config = ModelConfig(
        encoder_cls=classes.get(family.removesuffix("_gated"), "Dinov2withNorm"), decoder_patch_size=8,
        encoder_config_path=str(golden / "encoders" / family), encoder_input_size=112, num_embeddings=32,
        decoder_config_path=str(golden / "vqrae" / "decoder_config"),
    )  # fmt: skip
    inlined = inline_decoder(inline_encoder(config))
    assert inlined.encoder_config_path is inlined.decoder_config_path is None
    assert str(golden) not in inlined.model_dump_json()
    assert build_tokenizer(inlined).module == build_tokenizer(config, weights=False).module
    assert inline_decoder(inline_encoder(inlined)) == inlined


def test_architectures_contain_defaults(golden, tmp_path):
    """Files on the hub leave them out."""
    folder = shutil.copytree(golden / "encoders" / "siglip", tmp_path / "siglip")
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": {"patch_size": 32}}))
    config = ModelConfig(encoder_cls="SigLIP2wNorm", encoder_config_path=str(folder), decoder_config_path="ViT-Nano")
    inlined = inline_encoder(config)
    assert inlined.encoder_params.architecture["hidden_size"] == 768
    assert describe_encoder(inlined)[0] == describe_encoder(config)[0]


def test_embedded_encoder_makes_a_folder_complete(golden, tmp_path, assert_same):
    encoder = shutil.copytree(golden / "encoders" / "dinov2_with_registers", tmp_path / "models" / "vit")
    statistics = {"normalization_stat_path": str(golden / "vqrae" / "ema_vq_2d" / "stat.npz")}
    config, module, variables = pretrained(golden, encoder_config_path=str(encoder), **statistics)
    protocol = {"data": f"Folder('{tmp_path}/val', images=3)", "networks": {"lpips": {"trunk": "~/weights/vgg.pth"}}}
    provenance = {"version": "0.0.1", "metrics": {"eval/psnr": 20.0}, "protocol": protocol}
    tokenizer = Tokenizer(module, variables, config, frozen=True, provenance=provenance)
    folder = tokenizer.save_pretrained(tmp_path / "saved", name="me/tokens", embed_encoder=True)
    shutil.rmtree(encoder)
    again = Tokenizer.load(folder)
    assert_same(again.trained, variables)
    assert (again.hash, again.module) == (tokenizer.hash, tokenizer.module)
    assert again.provenance["protocol"]["networks"]["lpips"]["trunk"] == "vgg.pth"
    card = (folder / "README.md").read_text()
    assert str(tmp_path) not in card + (folder / "config.json").read_text()
    for words in (
        "(`vit`)",
        "license: other",
        "| psnr | 20 |",
        "Folder('val', images=3)",
        "pip install",
        'load("me/tokens")',
    ):
        assert words in card
    again.save_pretrained(tmp_path / "again", name="me/tokens")
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    with pytest.raises(ConfigError, match="encoder="):
        Tokenizer.load(folder, encoder=encoder)


def test_encoder_is_named_when_loading(golden, tmp_path, caplog, assert_same):
    encoder = shutil.copytree(golden / "encoders" / "dinov2_with_registers", tmp_path / "here")
    config, module, variables = pretrained(golden, encoder_config_path=str(encoder))
    tokenizer = Tokenizer(module, variables, config, frozen=True)
    folder = tokenizer.save_pretrained(tmp_path / "saved")
    assert str(encoder) in caplog.text  # a warning
    with pytest.raises(ConfigError) as caught:
        tokenizer.push_to_hub("me/tokens")
    assert (caught.value.field, caught.value.value) == ("model.encoder_config_path", str(encoder))
    elsewhere = encoder.rename(tmp_path / "elsewhere")
    with pytest.raises(WeightsError, match="encoder="):
        Tokenizer.load(folder)
    loaded = Tokenizer.load(folder, encoder=elsewhere)
    assert_same(loaded.trained, variables)
    assert loaded.config.encoder_config_path == str(elsewhere)
    weights = load_file(elsewhere / "model.safetensors")
    weights["embeddings.cls_token"] += 1
    save_file(weights, elsewhere / "model.safetensors")
    with pytest.raises(WeightsError, match="content hash"):
        Tokenizer.load(folder, encoder=elsewhere)


def test_changed_and_damaged_folders_are_refused(golden, tmp_path):
    config, _, variables = pretrained(golden)
    path = saving.save_folder(tmp_path, config, variables, frozen=True)
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**content, "version": "0.0.1"}))
    with pytest.raises(WeightsError, match="sha256"):
        Tokenizer.load(path)
    del content["sha256"]  # the changes are intended
    for change, message in (
        ({"encoder": content["encoder"] | {"sha256": "0" * 64}}, r"0{64}"),
        ({"model": content["model"] | {"num_embeddings": 33}},
         r"batch_stats/quantizer/codebook \(\(32, 32\) in the file, \(33, 32\)"),
        ({"model": None, "encoder": None}, r"config\.json"),
        ({}, r"model\.safetensors"),
    ):  # fmt: skip
        if not change:
            (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-100])
        (path / "config.json").write_text(json.dumps({k: v for k, v in (content | change).items() if v is not None}))
        with pytest.raises(WeightsError, match=message):
            Tokenizer.load(path)


def test_changed_bits_of_a_folder_are_noticed(golden, tmp_path, caplog):
    config, _, variables = pretrained(golden)
    path, rng = saving.save_folder(tmp_path, config, variables, frozen=True), np.random.default_rng(0)
    caplog.clear()  # the warning of the encoder's local path
    for name, tries in (("config.json", 60), ("model.safetensors", 20)):
        data = (path / name).read_bytes()
        for position, bit in zip(rng.integers(len(data), size=tries), rng.integers(8, size=tries), strict=True):
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            (path / name).write_bytes(changed)
            with pytest.raises((WeightsError, CheckpointError)):
                saving.read_weights(locate(path).path)
        (path / name).write_bytes(data)
    saving.read_weights(path)
    assert not caplog.records
    content = json.loads((path / "config.json").read_text())
    del content["sha256"]  # as in folders of versions without digests
    (path / "config.json").write_text(json.dumps(content))
    saving.read_weights(locate(path).path)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize("changes", [
    {}, {"quantizer": "none"}, {"quantizer": "fsq"},
    {"quantizer": "simvq", "quantizer_params": {"input_projection": True}},
])  # fmt: skip
def test_pytorch_checkpoint_round_trip_is_exact(golden, changes, assert_same):
    config, _, variables = pretrained(golden, **changes)
    checkpoint = pytorch_checkpoint.build_checkpoint(config, variables)
    names = "step epoch model ema optimizer scheduler disc disc_optimizer disc_scheduler"
    assert set(checkpoint) == set(names.split())
    _, back = pytorch_checkpoint.convert_checkpoint(config, checkpoint)
    for state in (back["batch_stats"], variables["batch_stats"]):
        for name in ("step", "begun"):
            state.get("quantizer", {}).pop(name, None)
    assert_same(back, variables)


@pytest.mark.slow
def test_simvq_has_an_identity_as_input_projection_in_pytorch(golden):
    config, module, variables = pretrained(golden, quantizer="simvq")
    checkpoint = pytorch_checkpoint.build_checkpoint(config, variables)
    fields = {"quantizer_params": config.quantizer_params.model_copy(update={"input_projection": True})}
    built, back = pytorch_checkpoint.convert_checkpoint(config.model_copy(update=fields), checkpoint)
    z = jax.random.normal(jax.random.key(0), (1, 4, 4, module.encoder.channels))
    ours, theirs = (m.apply(v, z, method="quantize").indices for m, v in ((module, variables), (built.module, back)))
    np.testing.assert_array_equal(theirs, ours)
    assert len(np.unique(ours)) > 1


@pytest.mark.parametrize(("changes", "field"), [
    ({"quantizer": "lfq"}, r"model\.quantizer='lfq'"),
    ({"quantizer_params": {"distance": "cosine"}}, r"quantizer_params\.distance='cosine'"),
    ({"quantizer_params": {"codebook_dim": 8}}, r"quantizer_params\.codebook_dim=8"),
    ({"quantizer": "fsq", "quantizer_params": {"adapter": "linear"}}, r"quantizer_params\.adapter='linear'"),
    ({"encoder_params": {"layers": (0, -1)}}, r"encoder_params\.layers=\(0, -1\)"),
    ({"encoder_params": {"fusion": "linear"}}, r"encoder_params\.fusion='linear'"),
    ({"resampler_tokens": 9}, r"resampler_tokens=9"),
])  # fmt: skip
def test_models_that_pytorch_lacks_are_refused(golden, changes, field):
    config, _, variables = pretrained(golden, **changes)
    with pytest.raises((ConfigError, WeightsError), match=field):
        pytorch_checkpoint.build_checkpoint(config, variables)


def test_registers_are_added(golden, caplog):
    config, _, variables = pretrained(golden, encoder_config_path=str(golden / "encoders" / "dinov2"))
    state = pytorch_checkpoint.build_checkpoint(config, variables)["model"]
    assert state["encoder.encoder.embeddings.register_tokens"].shape == (1, 4, 36)
    assert "registers" in caplog.text


def test_pytorch_file_of_plain_tensors(trained, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="PyTorch files need PyTorch")
    (path,) = run(trained, "--format=pytorch", f"--output={tmp_path / 'out.pt'}")
    loaded = torch.load(path, weights_only=True)
    assert loaded["model"].keys() == loaded["ema"].keys()
    size = sum(t.numel() * 4 for t in loaded["model"].values())
    assert path.stat().st_size < 1.2 * size + 1e5  # "model" and "ema" share their tensors
    for output in (tmp_path, tmp_path / "out.bin"):
        with pytest.raises(UserError) as caught:
            run(trained, "--format=pytorch", f"--output={output}")
        assert caught.value.field == "--output"
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(WeightsError, match=r"vqrae-jax\[torch\]"):
        run(trained, "--format=pytorch", f"--output={path}")


@pytest.mark.slow
def test_programs_run_without_the_package(trained, tmp_path):
    """In a process that cannot import it, for several batch sizes."""
    pytest.importorskip("flatbuffers", reason="jax.export writes with flatbuffers")
    run(trained, "--format=stablehlo", f"--output={tmp_path}")
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
    tokenizer = Tokenizer.load(trained)
    np.save(tmp_path / "images.npy", images(count=3))
    script = """
import sys
sys.modules["vqrae_jax"] = sys.modules["flax"] = None
import jax.export, numpy as np
from exported import load_programs
images = np.load("images.npy")
for portable, count in ((True, 1), (False, 1), (False, 3)):
    encode, decode = load_programs(".", portable)
    codes = encode(images[:count])
    np.savez(f"{portable}{count}.npz", codes=codes, images=decode(codes))
assert set(jax.export.deserialize(bytearray(open("encode.stablehlo", "rb").read())).platforms) == {"cpu", "cuda", "tpu"}
for name in ("minimum_supported_calling_convention_version", "deserialize"):
    setattr(jax.export, name, 1_000)  # as in a version that reads neither
    try:
        load_programs(".")
    except RuntimeError as error:
        assert "portable=True" in str(error) and f"jax=={jax.__version__}" in str(error)
    else:
        raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, count in (("True1", 1), ("False1", 1), ("False3", 3)):
        result = np.load(tmp_path / f"{name}.npz")
        codes = tokenizer.encode_to_indices(images(count=3)[:count])
        np.testing.assert_array_equal(result["codes"], codes)
        np.testing.assert_allclose(result["images"], tokenizer.decode_from_indices(codes), atol=1e-5)
    custom = {name: b"custom_call" in (tmp_path / name).read_bytes() for name in ("encode.mlirbc", "encode.stablehlo")}
    assert custom == {"encode.mlirbc": False, "encode.stablehlo": True}  # no guarantee of StableHLO covers these
    manifest, readme = (tmp_path / name for name in ("manifest.json", "README.txt"))
    manifest, readme = json.loads(manifest.read_text()), readme.read_text()
    assert "codes: int32 [B, 4, 4]" in readme
    assert manifest["expires_by"] in readme
    written, expires = (datetime.date.fromisoformat(manifest[name]) for name in ("written", "expires_by"))
    assert 180 <= (expires - written).days <= 184
    assert manifest["jax"] == jax.__version__
    assert manifest["calling_convention"] >= 9
    assert re.fullmatch(r"1\.\d+\.\d+", manifest["stablehlo"])


def test_missing_programs_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for portable, name in ((False, "encode.stablehlo"), (True, "encode.mlirbc")):
        with pytest.raises(FileNotFoundError, match=rf"{tmp_path / 'programs'} .*manifest\.json.*{name}"):
            exported.load_programs("~/programs", portable)


@pytest.mark.slow
def test_programs_of_a_continuous_autoencoder(golden, assert_close):
    _, module, variables = pretrained(golden, quantizer="none")
    programs, weights = stablehlo.export_programs(module, variables)
    batch = images(count=2)
    latents = programs["encode"].call(weights, batch)
    assert latents.shape == (2, 4, 4, 32)
    expected = np.clip(jax.jit(module.apply)(variables, batch), 0, 1)
    assert_close(programs["decode"].call(weights, latents), expected, 1e-5)


def test_run_loads_without_its_initial_decoder_file(trained, monkeypatch):
    from vqrae_jax import checkpoint

    meta = checkpoint.read_meta(checkpoint.find_checkpoint(trained))
    meta["config"]["model"]["pretrained_decoder_path"] = "/gone/decoder.npz"
    monkeypatch.setattr(checkpoint, "read_meta", lambda path: meta)
    assert Tokenizer.load(trained).image_size == 32
