import functools
import pathlib
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from vqrae_jax import config
from vqrae_jax.config import Config, ModelConfig
from vqrae_jax.errors import ConfigError

ROOT = pathlib.Path(__file__).parents[1]
ORIGIN = {
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


def test_the_origins_parameters_have_their_names_and_defaults():
    model = ModelConfig()
    assert {name: getattr(model, name) for name in ORIGIN} == ORIGIN


def test_json_round_trip():
    changed = Config(
        model={"encoder_params": {"layers": (2, -1), "architecture": {"hidden_size": 8}}}, train={"steps": 3}
    )
    assert config.from_json(config.to_json(changed)) == changed


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
        ("dinov2_b", "data.path", "/7", "/7"),
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
    ("values", "message"),
    [
        (
            {"model": {"num_embedings": 3}},
            r"unknown config field model\.num_embedings: did you mean model\.num_embeddings",
        ),
        ({"modle": {}}, "unknown config field modle: did you mean model"),
        ({"model": {"encoder_params": {"layer": (1,)}}}, r"model\.encoder_params\.layer: did you mean .*layers"),
        ({"model": {"num_embeddings": 0}}, r"model\.num_embeddings=0: .*greater than or equal to 1"),
        ({"model": {"num_embeddings": "many"}}, r"model\.num_embeddings='many'"),
        ({"model": {"quantizer": "emma"}}, r"model\.quantizer='emma': .*'ema'"),
        ({"model": {"vq_decay": 1.0}}, r"model\.vq_decay=1\.0"),
        ({"model": {"noise_tau": float("inf")}}, r"model\.noise_tau=inf"),
        ({"optimizer": {"decay_end_steps": -1}}, r"optimizer\.decay_end_steps=-1"),  # it is no "until the end"
        ({"data": {"resize": float("inf")}}, r"data\.resize=inf"),
        ({"data": {"scale": (3, 2)}}, r"scale=\(3\.0, 2\.0\)"),
        (
            {"data": {"batch_size": 10}, "optimizer": {"accumulate": 4}},
            r"batch_size=10 is not divisible .*accumulate=4",
        ),
        (
            {"model": {"attention": "cudnn"}},
            r"model: attention='cudnn' .* not dtype='float32': set model\.dtype='bfloat16', or model\.attention='xla'",
        ),
        ({"train": {"trainable": ("decoer",)}}, r"train\.trainable\.0='decoer'"),
    ],
)
def test_errors_name_field_value_and_remedy(values, message):
    with pytest.raises(ConfigError, match=message):
        config.from_dict(Config, values)


def test_all_errors_come_at_once():
    with pytest.raises(ConfigError) as error:
        config.from_dict(Config, {"model": {"a": 1, "num_embeddings": -1}, "train": {"steps": 0}})
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize("text", ["", "[1]", "{", "3"])
def test_what_is_no_config_is_said(text):
    with pytest.raises(ConfigError, match="the config is"):
        config.from_json(text)


START = "from vqrae_jax import config\n\n\ndef get_config():\n    c = config.defaults()\n"


@pytest.mark.parametrize(
    ("text", "argument", "message"),
    [
        ("def get_config(:\n", "", r"file\.py, line 1: SyntaxError: invalid syntax"),
        ("\nimport no_such_module\n", "", r"file\.py, line 2: ModuleNotFoundError: No module named 'no_such_module'"),
        (f"{START}    c.modle.x = 1\n", "", r"file\.py, line 6: AttributeError: .*Did you mean \"model\""),
        (f"{START}    open('no such file')\n", "", r"file\.py, line 6: FileNotFoundError: .*no such file"),
        (f"{START}    config.parse_decoder_and_size(3)\n", "", r"file\.py, line 6: AttributeError: 'int' object"),
        (f"{START}    config.parse_decoder_and_size('x')\n", "", "'x' is no decoder and picture size"),
        (f"{START}    return c.to_dict()\n", "", r"file\.py, line 4: get_config returns a dict; .*config\.defaults"),
        (START, "", r"file\.py, line 4: get_config returns a NoneType"),
        (f"{START}    return c\n", ":ViT-L", r"file\.py, line 4: get_config takes no argument 'ViT-L'"),
        ("def get_config(size):\n    pass\n", "", r"file\.py, line 1: get_config wants an argument: give .*:ARG"),
        ("", "", r"file\.py has no function get_config"),
    ],
)  # fmt: skip
def test_mistakes_in_a_config_file_are_one_line_with_their_place(text, argument, message, tmp_path):
    (tmp_path / "file.py").write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        config.load_config_file(f"{tmp_path / 'file.py'}{argument}")
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(ConfigError, match=r"other\.py is no file"):
        config.load_config_file(str(tmp_path / "other.py"))


def test_a_config_file_is_read_with_its_argument():
    read = config.load_config_file(f"{ROOT / 'configs' / 'dinov2_b.py'}:ViT-S,512")
    assert read.model.decoder_config_path == "ViT-S"
    with pytest.raises(AttributeError):
        read.nothing = 1


def test_steps_that_are_given_go_before_the_epochs_of_a_file():
    def file():
        values = config.defaults().to_dict()
        values["train"] |= {"steps": 7, "epochs": 16.0}
        values["optimizer"]["warmup_epochs"] = 1.0
        values["adversary"]["optimizer"]["warmup_epochs"] = 2.0
        return values

    values = file()
    assert (
        config.prefer_command_line_steps(
            values, {"data.path": "x", "train.evaluate_every": 3, "model.num_embeddings": 4}
        )
        == ""
    )
    assert values == file()
    told = config.prefer_command_line_steps(values, {"train.steps": 7, "adversary.optimizer.warmup_steps": 0})
    assert "\n" not in told
    assert "go before the config file's train.epochs=16.0, adversary.optimizer.warmup_epochs=2.0;" in told
    assert told.endswith("still in epochs: optimizer.warmup_epochs=1.0")
    assert config.epochs_to_steps(config.from_dict(Config, values), lambda: 2560).train.steps == 7
    assert config.epochs_to_steps(config.from_dict(Config, file()), lambda: 2560).train.steps == 160
    with pytest.raises(
        ConfigError, match=r"train\.steps=7 and train\.epochs=16\.0 are both given: leave one of them out"
    ):
        config.prefer_command_line_steps(file(), {"train.steps": 7, "train.epochs": 16.0})
    assert config.prefer_command_line_steps(file(), {"train.epochs": 16.0}) == ""


def test_what_epochs_are_in_steps_is_told(caplog):
    with caplog.at_level("INFO"):
        config.epochs_to_steps(Config(train={"epochs": 2.5}, data={"batch_size": 8}), lambda: 83)
    assert "in epochs of 10 steps: train.epochs=2.5 is steps=25" in caplog.text


def test_field_names_are_checked_by_path():
    config.check_field(Config, "model.encoder_params.architecture.anything")
    config.check_field(Config, "train.steps")
    with pytest.raises(ConfigError, match=r"train\.step: did you mean train\.steps"):
        config.check_field(Config, "train.step")
