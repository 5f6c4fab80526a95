"""The pretrained weights of a config: all missing ones in one message, and copies with the flags that name them."""

import pathlib
import re
from unittest import mock

import jax
import numpy as np
import pytest

from vqrae_jax import hub
from vqrae_jax.build import weights
from vqrae_jax.config import Config, from_dict
from vqrae_jax.errors import ConfigError, WeightsError
from vqrae_jax.preflight.chips import parse_topology
from vqrae_jax.preflight.programs import Plan, build_mesh
from vqrae_jax.pretrained import sources
from vqrae_jax.train import loop
from vqrae_jax.train.run import open_run

LOSSES = {
    "loss.perceptual.trunk": "./absent/trunk", "loss.perceptual.heads": "./absent/heads.pth",
    "adversary.path": "./absent/dino",
}  # fmt: skip
METRICS = {"evaluation.inception_path": None, "evaluation.encoder_path": "./absent/metric"}
MODEL = {
    "model.encoder_config_path": "./absent/encoder", "model.pretrained_decoder_path": "./absent/decoder.pt",
    "model.normalization_stat_path": "./absent/stats.npz",
}  # fmt: skip


def named(error):
    """Returns the fields that a message names, each at the start of a line."""
    return set(re.findall(r"^([\w.]+)=", str(error), re.M))


@pytest.fixture
def incomplete(tiny):
    """A function that returns a config whose weights are all missing."""

    def build(**sections):
        values = tiny(
            loss={"perceptual": {"weight": 1.0}}, adversary={"discriminator": "dino"},
            evaluation={"metrics": ("inception", "encoder", "lpips"), "training_metrics": ("inception",)},
        ).model_dump()  # fmt: skip
        for path, value in (LOSSES | METRICS | sections).items():
            *names, name = path.split(".")
            section = values
            for part in names:
                section = section[part]
            section[name] = value
        return from_dict(Config, values)

    return build


def test_training_names_all_missing_weights_before_it_reads_any(incomplete, tmp_path):
    config = incomplete(**MODEL, **{"model.encoder_params.architecture": {}})
    with pytest.raises(WeightsError) as error, open_run(config, tmp_path):
        pass
    assert named(error.value) == {*MODEL, *LOSSES, "evaluation.inception_path"}
    assert error.value.exit_code == 2  # inception_path is not set, which no attempt corrects
    remedies = ("perceptual.weight=0", "discriminator=none", "'inception' or", "https://")
    assert all(text in str(error.value) for text in remedies)


def test_evaluation_names_all_missing_weights(incomplete, trained):
    with pytest.raises(WeightsError) as error:
        loop.evaluate(incomplete(), trained)
    assert named(error.value) == {*METRICS, "loss.perceptual.trunk", "loss.perceptual.heads"}


def test_a_decoder_that_the_config_describes_has_no_weights(incomplete):
    for path, architecture in (("./absent/decoder", {}), (None, {"hidden_act": "gelu"})):
        config = incomplete(**{"model.decoder_config_path": path, "model.decoder_architecture": architecture})
        fields = {item.field for item in weights.list_weights(config, ())}
        assert ("model.decoder_config_path" in fields) == (path is not None)


def test_preflight_names_all_missing_descriptions(incomplete):
    config = incomplete(**MODEL, **{"model.encoder_params.architecture": {}})
    with pytest.raises(WeightsError) as error:
        Plan.build(config, parse_topology("cpu:1"), build_mesh(config, jax.devices()[:1]))
    assert named(error.value) == {"model.encoder_config_path", "adversary.path"}


def test_one_problem_keeps_its_class_and_field(incomplete):
    needed = weights.list_weights(incomplete(), ("inception",), losses=False)
    with pytest.raises(ConfigError) as error:
        weights.fetch_all(needed)
    assert (error.value.field, error.value.value) == ("evaluation.inception_path", None)


def test_only_networks_in_use_are_listed(incomplete, tiny):
    off = {"loss.perceptual.weight": 0.0, "adversary.discriminator": "patch"}
    for config in (tiny(), incomplete(**off)):
        assert [item.field for item in weights.list_weights(config, ("linear_probe",))] == ["model.decoder_config_path"]
    (item,) = weights.list_weights(Config(), ())
    assert (item.field, item.name) == ("model.encoder_config_path", "facebook/dinov2-base")
    encoder = {"loss.perceptual.network": "encoder", "loss.perceptual.path": "a/b", "adversary.discriminator": "none"}
    assert [item.name for item in weights.list_weights(incomplete(**encoder), ())][1:] == ["a/b"]


def test_copies_are_read_by_the_flags(golden, tiny, workdir):
    encoder, stats = golden / "encoders" / "dinov2", golden / "vqrae" / "ema_vq_2d" / "stat.npz"
    fields = {"encoder_config_path": str(encoder), "normalization_stat_path": str(stats)}
    others = {"decoder_config_path": "ViT-S", "encoder_params": {"architecture": {}}}
    config = tiny(model=fields | others)
    folder = str(workdir / "weights")
    flags = weights.copy_all(weights.list_weights(config, ()), folder)
    names, copies = zip(*(flag.removeprefix("--config.model.").split("=") for flag in flags), strict=True)
    assert names == tuple(fields)
    assert copies == (f"{folder}/dinov2", f"{folder}/stat.npz")
    for original, copy in zip((encoder, stats), copies, strict=True):
        first, second = sources.read_state_dict(str(original), ""), sources.read_state_dict(copy, "")
        assert first.keys() == second.keys()
        assert all(np.array_equal(first[name], second[name]) for name in first)


def test_copies_of_the_same_name_do_not_replace_each_other(golden, tiny, tmp_path):
    stats, decoder = golden / "vqrae" / "ema_vq_2d" / "stat.npz", tmp_path / "stat.npz"
    decoder.write_bytes((golden / "vqrae" / "ema_vq_2d" / "model.npz").read_bytes())
    config = tiny(model={"normalization_stat_path": str(stats), "pretrained_decoder_path": str(decoder)})
    flags = weights.copy_all(weights.list_weights(config, ()), str(tmp_path / "weights"))
    copies = dict(flag.removeprefix("--config.model.").split("=") for flag in flags)
    for name, original in (("normalization_stat_path", stats), ("pretrained_decoder_path", decoder)):
        assert pathlib.Path(copies[name]).read_bytes() == original.read_bytes()


@pytest.mark.parametrize(("status", "reads_cache"), [(401, False), (404, False), (429, True), (503, True)])
def test_a_busy_hub_is_as_one_that_cannot_be_reached(monkeypatch, tmp_path, status, reads_cache):
    from huggingface_hub.errors import HfHubHTTPError

    def refuse(repository):
        raise HfHubHTTPError("refused", response=mock.MagicMock(headers={}, status_code=status))

    monkeypatch.setattr(hub, "_list_files", refuse)
    load = mock.Mock(return_value=str(tmp_path))
    if reads_cache:
        assert hub.download("owner/name", load, "owner/name", "field") == tmp_path
        load.assert_called_once_with(None)
    else:
        with pytest.raises(WeightsError):
            hub.download("owner/name", load, "owner/name", "field")
        load.assert_not_called()


def test_gated_models_need_a_license_and_a_token(monkeypatch):
    from huggingface_hub.errors import GatedRepoError

    def refuse(repository):
        raise GatedRepoError("401 Client Error", response=mock.MagicMock(headers={}, status_code=401))  # of any client

    monkeypatch.setattr(hub, "_list_files", refuse)
    with pytest.raises(WeightsError, match=r"https://huggingface\.co/owner/name .*HF_TOKEN"):
        sources.fetch_folder("owner/name", "model.encoder_config_path")
