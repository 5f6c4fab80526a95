import contextlib
import functools
import pathlib
import re
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from vqrae_jax import config
from vqrae_jax.config import Config, ModelConfig
from vqrae_jax.config.schema import Section
from vqrae_jax.errors import ConfigError

ROOT = pathlib.Path(__file__).parents[1]
PYTORCH_VQRAE = {
    "num_embeddings": 8192,
    "commitment_cost": 0.25,
    "vq_decay": 0.99,
    "vq_epsilon": 1e-5,
    "quantize_before_reshape": False,
    "encoder_cls": "Dinov2withNorm",
    "encoder_config_path": "facebook/dinov2-base",
    "encoder_input_size": 224,
    "decoder_patch_size": 16,
    "pretrained_decoder_path": None,
    "noise_tau": 0,
    "reshape_to_2d": True,
    "normalization_stat_path": None,
}


def test_the_pytorch_vqraes_parameters_keep_names_and_defaults():
    model = ModelConfig()
    assert {name: getattr(model, name) for name in PYTORCH_VQRAE} == PYTORCH_VQRAE


def test_json_round_trip():
    changed = Config(
        model={"encoder_params": {"layers": (2, -1), "architecture": {"hidden_size": 8}}}, train={"steps": 3}
    )
    assert config.from_json(config.to_json(changed)) == changed


def test_configs_of_earlier_versions_are_read():
    values = Config(evaluation={"examples": 7}, train={"log_images": 5}).model_dump(mode="json")
    values["model"]["scan_layers"] = True
    values["evaluation"] = {"figures": ["lpips"], "training_figures": [], "pictures": 7}
    values["train"]["pictures"] = values["train"].pop("log_images")
    saved = config.from_saved(Config, values)
    assert (saved.evaluation.metrics, saved.evaluation.examples, saved.train.log_images) == (("lpips",), 7, 5)
    assert config.from_saved(ModelConfig, values["model"]) == ModelConfig()
    with pytest.raises(ConfigError) as error:
        config.from_saved(ModelConfig, {"scan_layer": True})
    assert error.value.field == "model.scan_layer"


def test_editable_defaults_are_the_defaults():
    assert config.from_dict(Config, config.defaults().to_dict()) == Config()


def test_optional_fields_of_the_editable_tree_take_values():
    tree = config.defaults()
    tree.data.path = "/a folder"
    tree.optimizer.decay_end_steps = 7
    built = config.from_dict(Config, tree.to_dict())
    assert (built.data.path, built.optimizer.decay_end_steps) == ("/a folder", 7)


@pytest.mark.parametrize(
    ("file", "field", "text", "value"),
    [
        ("recipe_16k", "model.quantizer_params.codebook_dim", "64", 64),  # the file has another
        ("dinov2_b", "model.quantizer_params.codebook_dim", "64", 64),
        ("recipe_16k", "train.epochs", "0.5", 0.5),
        ("recipe_16k", "train.epochs", "8", 8),
        ("dinov2_b", "adversary.start_epochs", "8", 8),
        ("dinov2_b", "optimizer.reference_batch", "256", 256),
        ("dinov2_b", "evaluation.images", "100", 100),
        ("recipe_16k", "model.quantizer_params.codebook_dim", "None", None),
        ("recipe_16k", "train.epochs", "None", None),
        ("dinov2_b", "model.encoder_config_path", "None", None),
        ("dinov2_b", "data.path", "2024", "2024"),
        ("quickstart", "model.encoder_config_path", "a/b", "a/b"),  # the file has None, the defaults have not
    ],
)
def test_flags_override_optional_fields(file, field, text, value, monkeypatch):
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    monkeypatch.setattr(sys, "argv", ["", f"--config={ROOT / 'configs' / file}.py", f"--config.{field}={text}"])
    values(sys.argv)
    built = config.from_dict(Config, values.config.to_dict())
    assert functools.reduce(getattr, field.split("."), built) == value


@pytest.mark.parametrize(
    ("values", "field", "value"),
    [
        ({"model": {"num_embeddings": 0}}, "model.num_embeddings", 0),
        ({"model": {"num_embeddings": "many"}}, "model.num_embeddings", "many"),
        ({"model": {"quantizer": "emma"}}, "model.quantizer", "emma"),
        ({"model": {"vq_decay": 1.0}}, "model.vq_decay", 1.0),
        ({"model": {"noise_tau": float("inf")}}, "model.noise_tau", float("inf")),
        ({"optimizer": {"decay_end_steps": -1}}, "optimizer.decay_end_steps", -1),  # does not mean "until the end"
        ({"data": {"resize": float("inf")}}, "data.resize", float("inf")),
        ({"data": {"scale": (3, 2)}}, "data.scale", (3.0, 2.0)),
        ({"evaluation": {"training_metrics": ("encoder", "sfid")}}, "evaluation.training_metrics", ("encoder", "sfid")),
        ({"evaluation": {"metrics": ("precision_recall",)}}, "evaluation.metrics", ("precision_recall",)),
        ({"data": {"batch_size": 10}, "optimizer": {"accumulate": 4}}, "data.batch_size", 10),
        ({"model": {"attention": "cudnn"}}, "model.attention", "cudnn"),
        ({"model": {"decoder_feature_blocks": 2}}, "model.decoder_feature_blocks", 2),
        (
            {"model": {"encoder_params": {"fusion": "linear"}, "normalization_stat_path": "stat.npz"}},
            "model.normalization_stat_path",
            "stat.npz",
        ),
        (
            {"model": {"resampler_tokens": 8, "normalization_stat_path": "x"}},
            "model.normalization_stat_path",
            "x",
        ),
        (
            {"model": {"encoder_params": {"fusion": "routed"}, "quantizer_params": {"whitening_dim": 8}}},
            "model.quantizer_params.whitening_dim",
            8,
        ),
        ({"model": {"resampler_tokens": 8, "quantizer": "multiscale"}}, "model.quantizer", "multiscale"),
        ({"model": {"resampler_tokens": 8, "reshape_to_2d": False}}, "model.reshape_to_2d", False),
        ({"model": {"resampler_blocks": 3}}, "model.resampler_blocks", 3),
        ({"train": {"code_neighbors": 100}}, "train.code_neighbors", 100),
        ({"model": {"resampler_nested": True}}, "model.resampler_nested", True),
        ({"model": {"decoder_grid": 8}}, "model.decoder_grid", 8),
        ({"train": {"trainable": ("decoer",)}}, "train.trainable.0", "decoer"),
    ],
)
def test_errors_carry_field_and_value(values, field, value):
    with pytest.raises(ConfigError) as error:
        config.from_dict(Config, values)
    assert (error.value.field, error.value.value) == (field, value)


def leaves(section, path=()):
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from leaves(field.annotation, (*path, name))
        else:
            yield (*path, name), "tuple" in str(field.annotation)


def accepted(value):
    """Returns the fields that accept a value, alone or in a tuple."""
    fields = set()
    for path, is_tuple in leaves(Config):
        for candidate in ((value,), (value, value)) if is_tuple else (value,):
            with contextlib.suppress(ConfigError):
                config.from_dict(Config, functools.reduce(lambda tree, name: {name: tree}, path[::-1], candidate))
                fields.add(".".join(path))
    return fields


def text_fields(section, *path):
    for name, value in section:
        if isinstance(value, Section):
            yield from text_fields(value, *path, name)
        elif type(section).model_fields[name].annotation in (str, str | None):
            yield (*path, name)


@pytest.mark.parametrize("path", list(text_fields(Config())), ids=".".join)
def test_the_home_folder_is_expanded_in_every_text(path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    values = functools.reduce(lambda inner, name: {name: inner}, reversed(path), "~/x~")
    assert functools.reduce(getattr, path, config.from_dict(Config, values)) == "/home/someone/x~"


@pytest.mark.parametrize("value", [2**63, 1e308, float("inf"), float("nan")])
def test_no_field_accepts_absurd_numbers(value):
    assert not accepted(value)


def test_fields_that_accept_large_or_negative_numbers_allocate_nothing():
    """Weights, rates, and numbers of steps or of images and devices that are compared with those that exist."""
    harmless = re.compile(
        r"(steps|_every|seconds|minutes|rate|weight|weight_decay|cost|_norm|_max|temperature|diversity|noise_tau|vq_epsilon|_threshold)$|"
        r"^(data\.scale|evaluation\.images|mesh\..*|train\.(keep_.*|seed)|.*reference_batch)$"
    )
    assert not {field for field in accepted(10**9) if not harmless.search(field)}
    blocks = {"model.encoder_params.layers", "model.decoder_features", "loss.perceptual.layers"}
    assert accepted(-1) == {*blocks, "mesh.data"}


@pytest.mark.parametrize("value", [10**9, -(2**63), 1e308, float("nan")])
def test_sizes_of_an_architecture_are_limited(value):
    with pytest.raises(ConfigError, match="hidden_size") as error:
        config.from_dict(Config, {"model": {"encoder_params": {"architecture": {"hidden_size": value}}}})
    assert error.value.field == "model.encoder_params.architecture"


def test_epochs_are_not_more_steps_than_the_state_counts():
    with pytest.raises(ConfigError) as error:
        config.epochs_to_steps(Config(train={"epochs": 1e6}, data={"batch_size": 1}), lambda: 10_000)
    assert error.value.field == "train.epochs"


@pytest.mark.parametrize(
    ("values", "field", "nearest"),
    [
        ({"model": {"num_embedings": 3}}, "model.num_embedings", "model.num_embeddings"),
        ({"modle": {}}, "modle", "model"),
        ({"model": {"encoder_params": {"layer": (1,)}}}, "model.encoder_params.layer", "model.encoder_params.layers"),
    ],
)
def test_unknown_fields_are_reported_with_the_nearest_name(values, field, nearest):
    with pytest.raises(ConfigError, match=rf"{re.escape(nearest)}\b") as error:
        config.from_dict(Config, values)
    assert error.value.field == field


def test_all_errors_are_reported_at_once():
    with pytest.raises(ConfigError) as error:
        config.from_dict(Config, {"model": {"a": 1, "num_embeddings": -1}, "train": {"steps": 0}})
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize("text", ["", "[1]", "{", "3"])
def test_text_without_a_config_is_an_error(text):
    with pytest.raises(ConfigError):
        config.from_json(text)


START = "from vqrae_jax import config\n\n\ndef get_config():\n    c = config.defaults()\n"


@pytest.mark.parametrize(
    ("text", "argument", "message"),
    [
        ("def get_config(:\n", "", r"file\.py, line 1: SyntaxError"),
        ("\nimport no_such_module\n", "", r"file\.py, line 2: ModuleNotFoundError: .*no_such_module"),
        (f"{START}    c.modle.x = 1\n", "", r"file\.py, line 6: AttributeError: .*model"),
        (f"{START}    open('no such file')\n", "", r"file\.py, line 6: FileNotFoundError: .*no such file"),
        (f"{START}    config.parse_decoder_and_size('x')\n", "", "'x'"),
        (f"{START}    return c.to_dict()\n", "", r"file\.py, line 4: .*dict"),
        (START, "", r"file\.py, line 4: .*NoneType"),
        (f"{START}    return c\n", ":ViT-L", r"file\.py, line 4: .*'ViT-L'"),
        ("def get_config(size):\n    pass\n", "", r"file\.py, line 1: .*:ARG"),
        ("", "", r"file\.py has no function get_config"),
    ],
)  # fmt: skip
def test_errors_in_a_config_file_are_one_line_with_file_and_line(text, argument, message, tmp_path):
    (tmp_path / "file.py").write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        config.load_config_file(f"{tmp_path / 'file.py'}{argument}")
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(ConfigError, match=r"other\.py"):
        config.load_config_file(str(tmp_path / "other.py"))


def test_a_config_file_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", str(ROOT))
    assert config.load_config_file("~/configs/quickstart.py") == config.load_config_file(
        f"{ROOT}/configs/quickstart.py"
    )


def test_a_config_file_gets_its_argument():
    loaded = config.load_config_file(f"{ROOT / 'configs' / 'dinov2_b.py'}:ViT-S,512")
    assert loaded.model.decoder_config_path == "ViT-S"
    with pytest.raises(AttributeError):
        loaded.nothing = 1


def test_steps_of_the_command_line_replace_epochs_of_the_file():
    def file():
        values = config.defaults().to_dict()
        values["train"] |= {"steps": 7, "epochs": 16.0}
        values["optimizer"]["warmup_epochs"] = 1.0
        values["adversary"]["optimizer"]["warmup_epochs"] = 2.0
        return values

    values = file()
    unrelated = {"data.path": "x", "train.evaluate_every": 3, "model.num_embeddings": 4}
    assert config.prefer_command_line_steps(values, unrelated) == ""
    assert values == file()
    message = config.prefer_command_line_steps(values, {"train.steps": 7, "adversary.optimizer.warmup_steps": 0})
    replaced, remaining = message.split(";")
    assert "train.epochs=16.0, adversary.optimizer.warmup_epochs=2.0" in replaced
    assert remaining.endswith("optimizer.warmup_epochs=1.0")
    assert config.epochs_to_steps(config.from_dict(Config, values), lambda: 2560).train.steps == 7
    assert config.epochs_to_steps(config.from_dict(Config, file()), lambda: 2560).train.steps == 160
    with pytest.raises(ConfigError, match=r"train\.epochs=16\.0") as error:
        config.prefer_command_line_steps(file(), {"train.steps": 7, "train.epochs": 16.0})
    assert (error.value.field, error.value.value) == ("train.steps", 7)
    assert config.prefer_command_line_steps(file(), {"train.epochs": 16.0}) == ""


def test_the_length_of_an_epoch_is_logged(caplog):
    with caplog.at_level("INFO"):
        config.epochs_to_steps(Config(train={"epochs": 2.5}, data={"batch_size": 8}), lambda: 83)
    assert "10 steps: train.epochs=2.5 is steps=25" in caplog.text


def test_field_names_are_checked_by_path():
    config.check_field(Config, "model.encoder_params.architecture.anything")
    config.check_field(Config, "train.steps")
    with pytest.raises(ConfigError, match=r"train\.steps") as error:
        config.check_field(Config, "train.step")
    assert error.value.field == "train.step"
