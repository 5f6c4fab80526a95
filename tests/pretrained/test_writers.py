"""Our trees under PyTorch's names and back, bit for bit."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from vqrae_jax.build.tokenizer import build_tokenizer, variable_shapes
from vqrae_jax.config import ModelConfig
from vqrae_jax.errors import WeightsError
from vqrae_jax.inference import pytorch_checkpoint
from vqrae_jax.pretrained import families, pytorch_vqrae, tables, writers

ENCODERS = ["dinov2", "dinov2_swiglu", "dinov2_with_registers", "dinov3", "dinov3_gated", "siglip", "vit_mae"]


def encoder_class(golden, case):
    return json.loads((golden / "encoders" / case / "params.json").read_text())["encoder_cls"] or "Dinov2withNorm"


def model(golden, case, quantizer="ema", **encoder_params):
    """A small model over one golden encoder."""
    return ModelConfig(
        encoder_cls=encoder_class(golden, case), encoder_config_path=str(golden / "encoders" / case),
        encoder_params=encoder_params, encoder_input_size=112 if case.startswith("dinov2") else 64,
        decoder_config_path=str(golden / "vqrae" / "decoder_config"), decoder_patch_size=4,
        quantizer=quantizer, num_embeddings=12, quantizer_params={"input_projection": True},
    )  # fmt: skip


def random_variables(shapes, seed):
    rng = np.random.default_rng(seed)
    variables = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)
    flat = flatten_dict(variables, sep="/")
    state = {path: value for path, value in pytorch_vqrae.STATE.items() if path in flat}
    return {"batch_stats": {}, **unflatten_dict(flat | state, sep="/")}


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_export_then_import_is_bit_exact(golden, assert_same, data):
    case = data.draw(st.sampled_from(ENCODERS))
    config = model(
        golden, case, data.draw(st.sampled_from(["ema", "simvq", "fsq", "none"])), normalize=data.draw(st.booleans())
    )
    version = data.draw(st.sampled_from([4, 5]))
    shapes = variable_shapes(build_tokenizer(config, weights=False))
    variables = random_variables(shapes, data.draw(st.integers(0, 99)))
    state = pytorch_vqrae.build_state_dict(variables, config.encoder_cls, config.quantizer, version, (8, 5, 5, 5))
    _, back = pytorch_checkpoint.convert_checkpoint(config, {"model": state}, "model")
    assert_same(back, variables)


@pytest.mark.parametrize("case", [*ENCODERS, "dinov2_with_registers_swiglu"])
def test_import_then_export_restores_the_hub_file(golden, case):
    """Every tensor that the network uses has the hub's name and its value."""
    config = model(golden, case, "none", normalize=False)
    family = families.FAMILIES[config.encoder_cls]
    read = build_tokenizer(config).pretrained["encoder"]
    written = writers.to_state_dict(read, family.table)
    file = safetensors.numpy.load_file(golden / "encoders" / case / "model.safetensors")
    prefix = tables.find_prefix(family.table, file)
    file = {name.removeprefix(prefix): tensor for name, tensor in file.items()}
    assert set(written) <= set(file)
    for name, tensor in written.items():
        if np.any(tensor != file[name]):
            assert name in {row.name for row in family.table if row.filler and row.path is None}, name
    unused = ("text_model.", "logit_", "decoder.")
    assert not {name for name in set(file) - set(written) if not name.startswith(unused)}


QUANTIZERS = {"ema_vq_2d": "ema", "ema_vq_tokens": "ema", "simvq": "simvq", "fsq": "fsq", "rae": "none"}


@pytest.mark.parametrize("case", QUANTIZERS)
@pytest.mark.parametrize("version", [4, 5])
def test_names_and_shapes_equal_recorded_checkpoints(golden, case, version):
    """Names, shapes and values equal a checkpoint of the PyTorch VQRAE, with the names of either transformers."""
    params = json.loads((golden / "vqrae" / case / "params.json").read_text())["params"]
    recorded = dict(np.load(golden / "vqrae" / case / "model.npz"))
    names = json.loads((golden / "vqrae" / case / "checkpoint_key_names.json").read_text())
    to_old = names["renamed"]
    if not names["checkpoint_pt_is_written_with"].startswith(f"transformers {version}"):
        renaming = to_old if version == 4 else {old: new for new, old in to_old.items()}
        recorded = {renaming.get(name, name): tensor for name, tensor in recorded.items()}
    config = model(
        golden, params["encoder_config_path"].split("/")[1], QUANTIZERS[case], normalize=case != "simvq"
    ).model_copy(update={
        "encoder_input_size": params["encoder_input_size"], "decoder_patch_size": params["decoder_patch_size"],
        "num_embeddings": params.get("num_embeddings", 1),
    })  # fmt: skip
    _, variables = pytorch_checkpoint.convert_checkpoint(config, {"model": recorded}, "model")
    levels = params.get("fsq_levels", ())
    state = pytorch_vqrae.build_state_dict(variables, config.encoder_cls, config.quantizer, version, levels)
    assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in recorded.items()}
    unused = {"quantizer.l2_norm_scale", *(name for name in state if name.endswith("mask_token") or ".head." in name)}
    for name, tensor in state.items():
        if name not in unused:
            np.testing.assert_array_equal(tensor, recorded[name], err_msg=name)


def test_dropped_dinov3_norm_becomes_the_identity_and_parameters_without_a_name_are_refused(golden):
    """The PyTorch VQRAE applies that norm's scale and bias, so (1, 0) gives our result."""
    config = model(golden, "dinov3", "none")
    variables = random_variables(variable_shapes(build_tokenizer(config, weights=False)), 0)
    state = pytorch_vqrae.build_state_dict(variables, config.encoder_cls, "none")
    assert np.all(state["encoder.encoder.norm.weight"] == 1)
    assert not np.any(state["encoder.encoder.norm.bias"])
    with pytest.raises(WeightsError, match="params/encoder/vit/block00/scale1/scale"):
        pytorch_vqrae.build_state_dict(variables, "MAEwNorm", "none")
    with pytest.raises(WeightsError, match=r"model\.quantizer='lfq'"):
        pytorch_vqrae.build_state_dict(variables, "Dinov3withNorm", "lfq")


def test_content_hash_follows_names_shapes_and_values():
    tree = {"a": {"b": np.arange(6, dtype=np.float32)}, "c": np.ones(2, np.float32)}
    assert writers.content_hash(tree) == writers.content_hash(dict(reversed(tree.items())))
    changed = [tree | {"c": np.zeros(2, np.float32)}, tree | {"c": np.ones((1, 2), np.float32)},
               {"a": tree["a"], "d": tree["c"]}]  # fmt: skip
    assert len({writers.content_hash(other) for other in [tree, *changed]}) == 4


@pytest.mark.parametrize("shape", [(4, 4, 32), (32,)])
def test_latent_statistics_fit_the_latents_of_pytorch(shape):
    """A grid of latents is [B, C, h, w] there, and rows are [B, N, C]."""
    var, z = (np.random.default_rng(0).uniform(0.5, 1, s).astype(np.float32) for s in (shape, (2, 4, 4, 32)))
    stat = pytorch_vqrae.build_statistics({"batch_stats": {"latent": {"var": var}}})
    assert stat["mean"] is None
    np.testing.assert_array_equal((z.transpose(0, 3, 1, 2) / stat["var"]).transpose(0, 2, 3, 1), z / var)
    rows = pytorch_vqrae.build_statistics({"batch_stats": {"latent": {"var": var}}}, grid=False)
    np.testing.assert_array_equal(z.reshape(2, 16, 32) / rows["var"], (z / var).reshape(2, 16, 32))
    assert pytorch_vqrae.build_statistics({"batch_stats": {}}) == {}
