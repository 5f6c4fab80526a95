import copy
import itertools
import json
import pathlib
import re
import subprocess
import sys

import pytest
import yaml

from vqrae_jax.config import Config, from_dict, load_config_file, pytorch_yaml
from vqrae_jax.errors import ConfigError

# Sections as in the PyTorch VQRAE's files, with numbers that YAML 1.1 reads as text.
FILE = """
stage_1:
  target: stage1.VQRAE
  ckpt: results/ep-last.pt
  params:
    encoder_cls: 'Dinov2withNorm'
    encoder_config_path: './models/dinov2-with-registers-base'
    encoder_input_size: 224
    encoder_params: {dinov2_path: './models/dinov2-with-registers-base', normalize: true}
    decoder_config_path: 'configs/decoder/ViTXL'
    num_embeddings: 64000
    commitment_cost: 0.25
    vq_decay: 0.99
    vq_epsilon: 1e-5
    freeze_encoder: true
    noise_tau: 0.
    normalization_stat_path: null
training:
  epochs: 16
  ema_decay: 0.9978
  batch_size: 32
  clip_grad: 0.0
  optimizer: &adamw {lr: 2e-4, betas: [0.9, 0.95], weight_decay: 0.0}
  scheduler: {type: cosine, warmup_epochs: 1, decay_end_epoch: 16, base_lr: 4.0e-4, final_lr: 1e-4}
gan:
  disc:
    arch: {dino_ckpt_path: 'models/discs/dino_vit_small_patch8_224.pth', norm_type: 'bn'}
    optimizer: {<<: *adamw, lr: 3e-4}
    augment: {prob: 1.0, cutout: 0.0}
  loss: {disc_loss: hinge, disc_weight: 0.75, perceptual_weight: 1.0, disc_start: 8, disc_upd_start: 6}
"""
EXPECTED = {
    "model": {
        "encoder_config_path": "facebook/dinov2-with-registers-base", "decoder_config_path": "ViT-XL",
        "decoder_train_pos_embed": True, "num_embeddings": 64_000, "codebook_init": "normal", "revival_threshold": 0,
        "quantizer_params": {"decay_warmup": False},
    },
    "data": {"resize": 1.5, "flip": False, "batch_size": 32},
    "loss": {"perceptual": {"weight": 1.0}},
    "adversary": {
        "discriminator": "dino", "path": "nyu-visionx/RAE-collections/discs/dino_vit_small_patch8_224.pth",
        "start_epochs": 6, "generator_start_epochs": 8, "window": 3,
        "optimizer": {"learning_rate": 3e-4, "final_learning_rate": 3e-4, "schedule": "constant", "decay_end_steps": 0},
    },
    "optimizer": {
        "learning_rate": 4e-4, "final_learning_rate": 1e-4, "warmup_epochs": 1, "decay_end_epochs": 16,
        "ema_warmup": False,
    },
    "train": {"epochs": 16, "log_every": 100},
}  # fmt: skip
MODEL, TRAINING = "stage_1.params", "training"
QUANTIZERS = {
    "none": {"stage_1.target": "stage1.RAE"}, "ema": {}, "simvq": {f"{MODEL}.use_simvq": True},
    "fsq": {f"{MODEL}.use_fsq": True, f"{MODEL}.fsq_levels": [8, 5]},
}  # fmt: skip
# Another value of every key, for the quantizer that reads it.
OTHER = {
    "stage_1.target": "RAE", "stage_1.ckpt": "x.pt", f"{MODEL}.use_simvq": True, f"{MODEL}.eps": 1e-3,
    f"{MODEL}.use_fsq": ("simvq", True, {f"{MODEL}.fsq_levels": [3, 3]}),
    f"{MODEL}.fsq_use_projection": ("fsq", False), f"{MODEL}.fsq_levels": ("fsq", [3, 3]),
    f"{MODEL}.freeze_encoder": False, f"{MODEL}.encoder_cls": "MAEwNorm", f"{MODEL}.encoder_config_path": "a/b",
    f"{MODEL}.encoder_input_size": 448, f"{MODEL}.decoder_config_path": "c/d", f"{MODEL}.decoder_patch_size": 8,
    f"{MODEL}.pretrained_decoder_path": "e/f/g.pt", f"{MODEL}.noise_tau": 0.5, f"{MODEL}.reshape_to_2d": False,
    f"{MODEL}.normalization_stat_path": "h/i/j.pt", f"{MODEL}.num_embeddings": 3, f"{MODEL}.commitment_cost": 0.5,
    f"{MODEL}.vq_decay": 0.9, f"{MODEL}.vq_epsilon": 1e-3, f"{MODEL}.quantize_before_reshape": True,
    f"{MODEL}.encoder_params.normalize": False, f"{MODEL}.encoder_params.num_tokens": 3,
    f"{MODEL}.encoder_params.dinov2_path": "k/l", f"{MODEL}.encoder_params.dinov3_path": "k/l",
    f"{MODEL}.encoder_params.model_name": "k/l",
    f"{TRAINING}.epochs": 3, f"{TRAINING}.batch_size": 3, f"{TRAINING}.global_batch_size": 3,
    f"{TRAINING}.ema_decay": 0.9, f"{TRAINING}.clip_grad": 1.0, f"{TRAINING}.log_interval": 3,
    f"{TRAINING}.global_seed": 3, f"{TRAINING}.num_workers": 3, f"{TRAINING}.checkpoint_interval": 3,
    f"{TRAINING}.sample_interval": 3, f"{TRAINING}.sample_every": 3,
    "gan.loss.perceptual_weight": 0.5, "gan.loss.lpips_start": 3, "gan.loss.commit_weight": 0.5,
    "gan.loss.disc_weight": 0.5, "gan.loss.disc_start": 7, "gan.loss.disc_upd_start": 5, "gan.loss.max_d_weight": 3,
    "gan.loss.disc_updates": 3, "gan.loss.disc_loss": "vanilla", "gan.loss.gen_loss": "non_saturating",
    "gan.disc.arch.dino_ckpt_path": "m/n/o.pth", "gan.disc.arch.ks": 5, "gan.disc.arch.key_depths": [2],
    "gan.disc.arch.norm_type": "gn", "gan.disc.arch.using_spec_norm": False, "gan.disc.arch.norm_eps": 1e-5,
    "gan.disc.arch.recipe": "S_16", "gan.disc.augment.prob": 0.5, "gan.disc.augment.cutout": 0.5,
    **{
        f"{section}.{key}": value for section in (TRAINING, "gan.disc") for key, value in {
            "optimizer.lr": ("none", 1e-3, {f"{section}.scheduler": None}), "optimizer.weight_decay": 0.1,
            "optimizer.type": "sgd", "optimizer.eps": 1e-5, "optimizer.betas": [0.5, 0.9],
            "scheduler.type": "linear", "scheduler.base_lr": 1e-3, "scheduler.final_lr": 1e-6,
            "scheduler.warmup_epochs": 2, "scheduler.warmup_steps": 7, "scheduler.decay_end_epoch": 9,
            "scheduler.decay_end_steps": 70, "scheduler.warmup_from_zero": False,
        }.items()
    },
    **{key: {"x": 1} for key in ("eval", "stage_2", "transport", "sampler", "guidance", "misc")},
}  # fmt: skip


@pytest.fixture
def convert(tmp_path):
    """Converts FILE with other values of some keys; None removes a key or section."""
    content = yaml.safe_load(FILE)

    def run(changes):
        tree = copy.deepcopy(content)
        for key, value in changes.items():
            *sections, name = key.split(".")
            section = tree
            for part in sections:
                section = section.setdefault(part, {})
            section.pop(name, None)
            if value is not None:
                section[name] = value
        (tmp_path / "theirs.yaml").write_text(json.dumps(tree))
        return pytorch_yaml.read_pytorch_yaml(tmp_path / "theirs.yaml", "--config")

    return run


def read(folder, text):
    (folder / "theirs.yaml").write_text(text)
    return pytorch_yaml.read_pytorch_yaml(folder / "theirs.yaml", "--config")


def test_a_training_config_as_the_pytorch_vqrae_ships_it(tmp_path):
    result = read(tmp_path, FILE)
    assert result.config == from_dict(Config, EXPECTED)
    assert result.trains
    named = {note.partition(":")[0] for note in result.notes}
    paths = {"encoder_config_path", "decoder_config_path"}
    assert named == {"stage_1.ckpt", "training.batch_size", "gan.disc.arch.dino_ckpt_path"} | {
        f"{MODEL}.{name}" for name in paths
    }


def test_absent_keys_have_pytorchs_defaults(tmp_path):
    vqrae, rae = (read(tmp_path, f"stage_1: {{target: {name}}}").config for name in ("stage1.VQRAE", "stage1.rae.RAE"))
    siglip = {"encoder_cls": "SigLIP2wNorm", "encoder_config_path": "google/siglip-large-patch16-384"}
    assert vqrae == from_dict(Config, {"model": {"num_embeddings": 16_384, **siglip}})
    assert rae == from_dict(Config, {"model": {"quantizer": "none", "noise_tau": 0.8}})
    trains = read(tmp_path, "stage_1: {target: stage1.RAE}\ntraining: {global_seed: 1}").config
    assert (trains.optimizer.ema_decay, trains.optimizer.clip_norm, trains.optimizer.schedule) == (
        0.9999,
        1,
        "constant",
    )
    assert (trains.train.epochs, trains.data.batch_size, trains.adversary.discriminator) == (200, 16, "none")


def test_quantizers(convert):
    models = {name: convert(changes).config.model for name, changes in QUANTIZERS.items()}
    assert {name: model.quantizer for name, model in models.items()} == {name: name for name in models}
    assert models["simvq"].quantizer_params.input_projection
    assert (models["fsq"].quantizer_params.levels, models["fsq"].quantizer_params.adapter) == ((8, 5), "mlp")
    rates = {name: convert(changes).config.optimizer.quantizer_rate for name, changes in QUANTIZERS.items()}
    assert rates == {"none": 1, "ema": 1, "simvq": 1, "fsq": 0}
    assert convert(QUANTIZERS["simvq"] | {"gan.loss.commit_weight": 1.0}).config.optimizer.quantizer_rate == 0
    dinov3 = {f"{MODEL}.encoder_cls": "Dinov3withNorm"}
    assert not convert(dinov3).config.model.encoder_params.normalize


def test_trained_parts(convert):
    frozen, trained = ("quantizer", "decoder"), ("encoder", "quantizer", "decoder")
    for family, parts in {"Dinov3withNorm": trained, "SigLIP2wNorm": frozen}.items():
        changes = {f"{MODEL}.freeze_encoder": False, f"{MODEL}.encoder_cls": family}
        assert convert(changes).config.train.trainable == parts
    assert convert({}).config.train.trainable == frozen


def test_no_key_is_dropped_silently(convert):
    """Another value of a key changes the config, or what is reported about it."""
    assert OTHER.keys() == pytorch_yaml.KNOWN.keys()
    bases = {}
    for key, other in OTHER.items():
        quantizer, value, base = ("ema", other, {}) if not isinstance(other, tuple) else (*other, {})[:3]
        base = QUANTIZERS[quantizer] | base
        before = bases[str(base)] = bases.get(str(base)) or convert(base)
        after = convert(base | {key: value})
        reported = any(note.startswith(f"{key}:") for note in after.notes)
        assert (before.config, before.stat_eps) != (after.config, after.stat_eps) or reported, key


def test_every_key_and_difference_is_documented():
    page = (pathlib.Path(__file__).parents[1] / "docs" / "from_pytorch.md").read_text()
    for key in pytorch_yaml.KNOWN:
        assert re.search(rf"`([\w.]+\.)?{key.rpartition('.')[2]}`", page), key
    always = [pytorch_yaml._ALWAYS, *pytorch_yaml._QUANTIZERS.values()]
    for field in {name for fields in always for name in fields}:
        assert f"| `{field}`" in page, field


def test_keys_without_an_effect_are_reported(convert):
    for quantizer, key, value in (("simvq", "vq_decay", 0.9), ("fsq", "num_embeddings", 5), ("none", "use_fsq", True)):
        result = convert(QUANTIZERS[quantizer] | {f"{MODEL}.{key}": value})
        assert any(note.startswith(f"{MODEL}.{key}: ") for note in result.notes)
        assert result.config == convert(QUANTIZERS[quantizer]).config


def test_unknown_keys_are_errors_with_a_suggestion(convert):
    for key, suggestion in {
        f"{MODEL}.codebook_size": f"{MODEL}.num_embeddings, model.num_embeddings here",
        f"{MODEL}.use_simvqq": "model.quantizer here",
        "training.vq_weight": "gan.loss.commit_weight, loss.vq_weight here",
        "training.learning_rate": "known keys: epochs",
        "trainig": "did you mean training",
        "wandb": "known keys: .*stage_1",
    }.items():
        with pytest.raises(ConfigError, match=suggestion) as error:
            convert({key: 3})
        assert error.value.field == key
    with pytest.raises(ConfigError, match=r"(?s)training.a: .*gan.loss.b: "):
        convert({"training.a": 1, "gan.loss.b": 1})


def test_invalid_values_name_the_key(convert):
    values = {
        f"{MODEL}.num_embeddings": -1, f"{MODEL}.use_fsq": "maybe", f"{MODEL}.eps": "small", "stage_1.target": "DiT",
        "training.optimizer": 3, "training.epochs": "many", "gan.loss.disc_loss": "wgan",
        "gan.loss.disc_weight": True, "training.optimizer.betas": [0.9, 2], "gan.disc.arch.key_depths": [0, -1],
    }  # fmt: skip
    for key, value in [*values.items(), (f"{MODEL}.eps", -1), (f"{MODEL}.eps", True)]:
        with pytest.raises(ConfigError) as error:
            convert({key: value})
        assert error.value.field == key
    with pytest.raises(
        ConfigError, match=r"(?s)training\.batch_size.*data\.batch_size.*training\.epochs.*train\.epochs"
    ):
        convert({"training.epochs": "many", "training.batch_size": -1})
    with pytest.raises(ConfigError) as error:
        convert({f"{MODEL}.use_fsq": True})
    assert error.value.field == f"{MODEL}.fsq_levels"
    assert convert({f"{MODEL}.eps": "1e-3"}).stat_eps == 1e-3  # a number in quotes


BOMB = "misc:\n  a0: &a0 [x]\n" + "".join(f"  a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40))


@pytest.mark.parametrize(
    "text",
    [
        "stage_1: !!python/object/apply:os.system ['touch ran']",
        "stage_1: {target: !!python/name:os.system ''}",
        *(
            f"{BOMB}stage_1: {{target: stage1.VQRAE, params: {params}}}"
            for params in (
                "{fsq_levels: *a39}",
                "{use_fsq: true, fsq_levels: *a39}",
                "*a39",
                "{noise_tau: {a: *a39}}",
            )
        ),
        "stage_1: {target: stage1.VQRAE, params: {use_fsq: true, fsq_levels: &x [*x]}}",
        "stage_1: &x {target: stage1.VQRAE, params: *x}",
        "[" * 1000,
        "stage_1: {target: stage1.RAE, params: {noise_tau: 1, noise_tau: 2}}",
        "stage_1:\n\ttarget: stage1.RAE",
        "stage_1: {target: ${oc.env:HOME}}",
        "1: 2",
        "- 1",
        "",
        "\0\1",
        "# " + "x" * 2**20,
    ],
    ids=itertools.count(),
)
def test_files_that_are_not_configs_are_errors_and_run_no_code(text, tmp_path, monkeypatch, deadline):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text)
    assert len(str(error.value)) < 1000
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.yaml"]


def test_relative_paths_start_at_any_folder_above_the_file(tmp_path):
    folder = tmp_path / "repository" / "configs" / "stage1"
    folder.mkdir(parents=True)
    encoder = tmp_path / "repository" / "models" / "dinov2-with-registers-base"
    encoder.mkdir(parents=True)
    result = read(folder, FILE)
    assert result.config.model.encoder_config_path == f"{tmp_path}/repository/./models/dinov2-with-registers-base"
    assert not any("dinov2" in note for note in result.notes)


def test_a_written_config_file_is_the_config_and_nothing_else(convert, tmp_path):
    """The values and the notes come from a file of somebody else."""
    attack = "x'''\"\"\"\nimport os\ros.mkdir('ran')\u2028\\"
    result = convert({f"{MODEL}.normalization_stat_path": attack, "gan.disc.arch.dino_ckpt_path": f"../dino{attack}"})
    text = pytorch_yaml.to_python(result.config, "Trains.", [*result.notes, attack])
    (tmp_path / "train.py").write_text(text)
    assert from_dict(Config, load_config_file(str(tmp_path / "train.py")).to_dict()) == result.config
    assert len(text.splitlines()) == text.count("\n")
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 or "No module named" in done.stderr
    assert not (tmp_path / "ran").exists()
