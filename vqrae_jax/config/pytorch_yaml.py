"""Configs of the PyTorch VQRAE and RAE: YAML files with the sections stage_1, training and gan, converted to ours.

A key has the meaning of one of our fields (`FIELDS`), is converted by a function (`CONVERTED`), or becomes a note: it
has only one value here (`CONSTANT`), or does not change what is trained (`UNUSED`). Every other key is an error. Absent
keys have the values that the PyTorch programs use for them.
"""

import dataclasses
import difflib
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vqrae_jax.config.load import from_dict
from vqrae_jax.config.schema import Config, Section
from vqrae_jax.errors import ConfigError, UserError, first_line

Values = dict[str, Any]  # by paths, as in "stage_1.params.noise_tau" or "model.noise_tau"

MODEL, ENCODER, LOSS, DISC = "stage_1.params", "stage_1.params.encoder_params", "gan.loss", "gan.disc"
OPTIMIZERS = {"training": "optimizer", DISC: "adversary.optimizer"}  # section -> ours
MAX_BYTES = 2**20  # of a YAML file
STAT_EPS = 1e-5  # added to the variance of latents

# Section -> section of ours, and the names in both; keys of several values of a field are in ascending precedence.
_SAME = (
    "encoder_cls encoder_config_path encoder_input_size decoder_config_path decoder_patch_size pretrained_decoder_path "
    "noise_tau reshape_to_2d normalization_stat_path num_embeddings commitment_cost vq_decay vq_epsilon "
    "quantize_before_reshape"
)
_PATHS = ("dinov2_path", "dinov3_path", "model_name")  # of encoder_params, usually equal to encoder_config_path
_TABLES: dict[tuple[str, str], dict[str, str]] = {
    (MODEL, "model"): {name: name for name in _SAME.split()} | {"fsq_levels": "quantizer_params.levels"},
    (ENCODER, "model.encoder_params"): {name: name for name in ("normalize", *_PATHS)},
    ("training", "train"): {"epochs": "epochs", "log_interval": "log_every", "global_seed": "seed"},
    ("training", "data"): {"batch_size": "batch_size", "global_batch_size": "batch_size"},
    ("training", "optimizer"): {"ema_decay": "ema_decay", "clip_grad": "clip_norm"},
    (LOSS, "loss"): {
        "perceptual_weight": "perceptual.weight", "lpips_start": "perceptual.start_epochs",
        "commit_weight": "vq_weight",
    },
    (LOSS, "adversary"): {
        "disc_weight": "weight", "disc_start": "generator_start_epochs", "disc_upd_start": "start_epochs",
        "max_d_weight": "adaptive_max", "disc_updates": "disc_updates", "disc_loss": "loss",
        "gen_loss": "generator_loss",
    },
    (f"{DISC}.arch", "adversary"): {
        "dino_ckpt_path": "path", "ks": "window", "key_depths": "taps", "norm_type": "norm",
        "using_spec_norm": "spectral",
    },
    (f"{DISC}.augment", "adversary"): {"prob": "augment", "cutout": "cutout"},
}  # fmt: skip
_OPTIMIZER = {
    "optimizer.lr": "learning_rate", "optimizer.weight_decay": "weight_decay", "scheduler.type": "schedule",
    "scheduler.base_lr": "learning_rate", "scheduler.final_lr": "final_learning_rate",
    "scheduler.warmup_epochs": "warmup_epochs", "scheduler.warmup_steps": "warmup_steps",
    "scheduler.decay_end_epoch": "decay_end_epochs", "scheduler.decay_end_steps": "decay_end_steps",
}  # fmt: skip
# Key -> the field with the same meaning.
FIELDS = {
    f"{section}.{key}": f"{ours}.{name}"
    for (section, ours), names in [*_TABLES.items(), *((pair, _OPTIMIZER) for pair in OPTIMIZERS.items())]
    for key, name in names.items()
}
# Key -> the field that depends on it.
CONVERTED = {
    "stage_1.target": "model.quantizer", f"{MODEL}.use_simvq": "model.quantizer", f"{MODEL}.use_fsq": "model.quantizer",
    f"{MODEL}.fsq_use_projection": "model.quantizer_params.adapter", f"{MODEL}.freeze_encoder": "train.trainable",
    f"{MODEL}.eps": "model.normalization_stat_path",
    **{f"{section}.optimizer.betas": f"{ours}.b1 and b2" for section, ours in OPTIMIZERS.items()},
}  # fmt: skip
# Key -> its only value here.
_ADAMW = {"optimizer.type": "adamw", "optimizer.eps": 1e-8, "scheduler.warmup_from_zero": True}
CONSTANT = {f"{section}.{name}": value for section in OPTIMIZERS for name, value in _ADAMW.items()}
CONSTANT[f"{DISC}.arch.norm_eps"] = 1e-6
# Key -> what it corresponds to.
UNUSED = {
    "stage_1.ckpt": "the weights are those of --checkpoint",
    f"{ENCODER}.num_tokens": "has no effect in PyTorch either",
    f"{DISC}.arch.recipe": "follows from the weights in adversary.path",
    "training.num_workers": "depends on the machine; set data.workers and data.threads",
    "training.checkpoint_interval": "set train.checkpoint_every, in steps",
    **dict.fromkeys(("training.sample_interval", "training.sample_every"), "set train.evaluate_every"),
    "eval": "set data.eval_path, train.evaluate_every and evaluation.metrics",
    **dict.fromkeys(("stage_2", "transport", "sampler", "guidance", "misc"), "only the tokenizer, stage_1, is read"),
}
KNOWN = FIELDS | CONVERTED | dict.fromkeys((*CONSTANT, *UNUSED), "")
_SECTIONS = {path[: dot.start()] for path in KNOWN for dot in re.finditer(r"\.", path)}
# Names of other projects and of the PyTorch VQRAE's documentation, for suggestions.
_SYNONYMS = {
    "codebook_size": "num_embeddings", "n_embed": "num_embeddings", "beta": "commitment_cost", "decay": "vq_decay",
    "levels": "fsq_levels", "vq_weight": "commit_weight",
}  # fmt: skip

# Values of absent keys, where ours differ.
_RAE = {"encoder_cls": "Dinov2withNorm", "encoder_config_path": "facebook/dinov2-base", "noise_tau": 0.8}
_VQRAE = {
    "encoder_cls": "SigLIP2wNorm", "encoder_config_path": "google/siglip-large-patch16-384", "num_embeddings": 16_384,
}  # fmt: skip
_TRAINING = {
    "training.epochs": 200, "training.batch_size": 16, "training.ema_decay": 0.9999, "training.clip_grad": 1.0,
    "training.log_interval": 100, f"{LOSS}.disc_weight": 0.0,
}  # fmt: skip
# Keys without an effect, by quantizer.
_UNREAD = {
    "none": "num_embeddings commitment_cost vq_decay vq_epsilon fsq_levels use_simvq use_fsq fsq_use_projection "
            "freeze_encoder quantize_before_reshape",
    "ema": "fsq_levels fsq_use_projection",
    "simvq": "vq_decay vq_epsilon fsq_levels fsq_use_projection",
    "fsq": "num_embeddings commitment_cost vq_decay vq_epsilon use_simvq",
}  # fmt: skip
# What the PyTorch programs always do, where our defaults differ; by quantizer for its settings.
_ALWAYS = {
    "model.decoder_train_pos_embed": True, "data.resize": 1.5, "data.flip": False, "optimizer.ema_warmup": False,
}  # fmt: skip
_QUANTIZERS = {
    "none": {}, "simvq": {"model.codebook_init": "normal"}, "fsq": {"optimizer.quantizer_rate": 0.0},
    "ema": {
        "model.codebook_init": "normal", "model.revival_threshold": 0.0, "model.quantizer_params.decay_warmup": False,
    },
}  # fmt: skip
_OWNERS = {"dino": "facebook", "vit-mae": "facebook", "siglip": "google"}  # of encoders on the hub, by their names


@dataclasses.dataclass(frozen=True)
class PyTorchConfig:
    """A converted file.

    Attributes:
      config: what the file says; if it trains, also what the PyTorch programs always do.
      notes: a sentence for each key that no field expresses, "KEY: ...".
      trains: whether the file has the sections of a training.
      stat_eps: number that is added to the variance of latents.
      keys: our field -> the key that sets it.
    """

    config: Config
    notes: Sequence[str] = ()
    trains: bool = False
    stat_eps: float = STAT_EPS
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)


def read_pytorch_yaml(file: pathlib.Path, field: str) -> PyTorchConfig:
    """Reads a config of the PyTorch VQRAE or RAE; relative paths in it may start at any folder above the file.

    `field` is what names the file, for messages.

    Raises:
      ConfigError: lists every unknown key, with the nearest known one and its name here.
    """
    content = _read_yaml(file, field)
    if "stage_2" in content:  # the other sections are then about the diffusion model
        content = {name: value for name, value in content.items() if name == "stage_1" or name in UNUSED}
    values = _flatten(content)
    for name in _PATHS:
        if values.get(f"{ENCODER}.{name}") == values.get(f"{MODEL}.encoder_config_path"):
            values.pop(f"{ENCODER}.{name}", None)
    quantizer, trains = _quantizer(values), any(key.startswith(("training.", "gan.")) for key in values)
    unread = {f"{MODEL}.{name}" for name in _UNREAD[quantizer].split()}
    notes = [f"{key}: {UNUSED[key]}" for key in values if key in UNUSED]
    notes += [f"{key}: has no effect with model.quantizer={quantizer!r}" for key in values if key in unread]
    defaults = {f"{MODEL}.{name}": value for name, value in (_RAE if quantizer == "none" else _VQRAE).items()}
    values = defaults | (_TRAINING if trains else {}) | values
    values = {key: _locate(key, value, file, notes) for key, value in values.items() if key not in unread}
    fields = _convert_model(values, quantizer, notes)
    fields |= _convert_training(values, quantizer, notes) if trains else {}
    keys = {ours: key for key, ours in (CONVERTED | FIELDS).items() if key in values}
    keys |= {f"{ours}.{b}": f"{name}.optimizer.betas" for name, ours in OPTIMIZERS.items() for b in ("b1", "b2")}
    config = from_dict(Config, _nest(fields), lambda error: name_key(error, keys))
    eps = _number(values, f"{MODEL}.eps", STAT_EPS)
    if not 0 <= eps < float("inf"):
        raise ConfigError("must be a finite number of at least 0", field=f"{MODEL}.eps", value=eps)
    if trains and eps != STAT_EPS and config.model.normalization_stat_path:
        notes.append(f"{MODEL}.eps: the imported tokenizer has it; training adds {STAT_EPS}")
    return PyTorchConfig(config, notes, trains, eps, keys)


def name_key(error: UserError, keys: Mapping[str, str]) -> UserError:
    """Returns an error of a field as one of the key that sets it, with the field in the message."""
    key = next((key for path, key in keys.items() if f"{error.field}.".startswith(f"{path}.")), None)
    message = f"{error.message} ({error.field} here)"
    return type(error)(message, field=key, value=error.value, exit_code=error.exit_code) if key else error


def to_python(config: Config, title: str, comments: Sequence[str]) -> str:
    """Returns the text of a config file, as in configs/, that sets the fields which differ from the defaults."""
    comments = [f"# {''.join(c if c.isprintable() else ' ' for c in comment)}" for comment in comments]  # one line each
    fields = [f"    c.{path} = {value!r}" for path, value in _differing(config, Config())]
    head = [f'"""{title}"""', "", *comments, *([""] if comments else []), "from vqrae_jax import config", "", ""]
    return "\n".join([*head, "def get_config():", "    c = config.defaults()", *fields, "    return c", ""])


def _read_yaml(file: pathlib.Path, field: str) -> Values:
    """Reads a YAML file of plain values; tags that create objects and repeated keys are errors."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if repeated := sorted({name for name in names if names.count(name) > 1}):
                problem = f"repeated keys: {', '.join(repeated)}"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
            return super().construct_mapping(node, deep)

    # YAML 1.2 and the PyTorch programs read 1e-5 as a number; PyYAML reads only 1.0e-5 as one.
    number = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    if file.stat().st_size > MAX_BYTES:
        raise ConfigError(f"is larger than {MAX_BYTES} bytes, so it is not a config", field=field, value=str(file))
    try:
        values = yaml.load(file.read_text("utf-8"), Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or first_line(error)
        line = f", line {mark.line + 1}" if mark else ""
        message = f"is not a YAML file of plain values{line}: {problem}"
        raise ConfigError(message, field=field, value=str(file)) from None
    if not isinstance(values, dict) or "stage_1" not in values:
        raise ConfigError("must have the section stage_1 of the PyTorch VQRAE or RAE", field=field, value=str(file))
    return values


def _flatten(values: Values) -> Values:
    """Returns the values by their paths; unknown keys are errors."""
    flat, unknown, pending = {}, [], [("", values)]
    for prefix, section in pending:
        for name, value in section.items():
            path = f"{prefix}{name}"
            items = value if isinstance(value, list) else [value]
            if path in UNUSED or (path in KNOWN and not any(isinstance(item, dict | list) for item in items)):
                flat[path] = value
            elif path in KNOWN:
                raise ConfigError("must be a plain value or a list of plain values", field=path)
            elif path not in _SECTIONS:
                unknown.append(ConfigError(f"unknown key; {_suggest(path)}", field=path))
            elif isinstance(value, dict):
                pending.append((f"{path}.", value))
            elif value is not None:
                raise ConfigError("must be a section", field=path)
    if unknown:
        raise unknown[0] if len(unknown) == 1 else ConfigError("\n".join(map(str, unknown)))
    return flat


def _suggest(path: str) -> str:
    """Describes the known key or section that is nearest to an unknown one, with its name here."""
    section, _, name = path.rpartition(".")
    # Those of the same section first.
    keys = sorted([*KNOWN, *sorted(_SECTIONS)], key=lambda key: key.rpartition(".")[0] != section)
    names = [key.rpartition(".")[2] for key in keys]
    near = difflib.get_close_matches(_SYNONYMS.get(name, name), names, n=1, cutoff=0.7)
    if not near:
        listed = [key.removeprefix(f"{section}.") for key in keys if key.rpartition(".")[0] == section]
        return f"known keys: {', '.join(listed)}; remove it if no PyTorch program reads it"
    key = keys[names.index(near[0])]
    return f"did you mean {key}{f', {ours} here' if (ours := KNOWN.get(key)) else ''}?"


def _locate(key: str, value: Any, file: pathlib.Path, notes: list[str]) -> Any:
    """Returns the path on this machine that a key names, or otherwise its hub id."""
    if not value or not isinstance(value, str) or not key.endswith(("_path", "model_name")):
        return value
    for folder in ("", *map(str, file.absolute().parents)):
        if os.path.exists(path := os.path.join(folder, os.path.expanduser(value))):
            return path
    name, local = os.path.basename(value), value.startswith((".", "/", "~")) or value.count("/") > 1
    if size := re.fullmatch(r"ViT-?(B|L|XL)", name):
        hub = f"ViT-{size[1]}"
    elif release := re.search(r"models/((decoders|stats|discs)/.+)", value):
        hub = f"nyu-visionx/RAE-collections/{release[1]}"
    else:
        owner = next((owner for start, owner in _OWNERS.items() if name.startswith(start)), None)
        hub = f"{owner}/{name}" if owner and local and "://" not in value else value
    if hub != value:
        notes.append(f"{key}: {value!r} is not on this machine; {hub} is used")
    return hub


def _quantizer(values: Values) -> str:
    target = values.get("stage_1.target")
    if str(target).rpartition(".")[2] == "RAE":
        return "none"
    if str(target).rpartition(".")[2] != "VQRAE":
        message = "must end with RAE or VQRAE, the class of the model"
        raise ConfigError(message, field="stage_1.target", value=target)
    if not _flag(values, "use_fsq", False):
        return "simvq" if _flag(values, "use_simvq", False) else "ema"
    if not values.get(f"{MODEL}.fsq_levels"):
        raise ConfigError("is missing, but use_fsq needs it", field=f"{MODEL}.fsq_levels")
    return "fsq"


def _convert_model(values: Values, quantizer: str, notes: list[str]) -> Values:
    """Returns the fields of the model section."""
    fields = {FIELDS[key]: value for key, value in values.items() if FIELDS.get(key, "").startswith("model.")}
    fields["model.quantizer"] = quantizer
    if quantizer == "simvq":
        fields["model.quantizer_params.input_projection"] = True
    if quantizer == "fsq":
        fields["model.quantizer_params.adapter"] = "mlp" if _flag(values, "fsq_use_projection", True) else "none"
    if fields["model.encoder_cls"] == "Dinov3withNorm":
        fields["model.encoder_params.normalize"] = False
        notes.append(f"{ENCODER}.normalize: the PyTorch VQRAE never normalizes DINOv3, so it is False here")
    return fields


def _convert_training(values: Values, quantizer: str, notes: list[str]) -> Values:
    """Returns the fields of all other sections."""
    fields = {ours: values[key] for key, ours in FIELDS.items() if key in values and not ours.startswith("model.")}
    fields |= _ALWAYS | _QUANTIZERS[quantizer] | _convert_optimizer(values, "training")
    fields["optimizer.clip_norm"] = max(_number(values, "training.clip_grad", 0.0), 0.0)
    if not _flag(values, "freeze_encoder", True) and values[f"{MODEL}.encoder_cls"] == "SigLIP2wNorm":
        notes.append(f"{MODEL}.freeze_encoder: SigLIP receives no gradients in PyTorch, so it is frozen here too")
    elif not _flag(values, "freeze_encoder", True):
        fields["train.trainable"] = ("encoder", "quantizer", "decoder")
        notes.append(f"{MODEL}.freeze_encoder: the encoder trains; in PyTorch only train_stage1_wb.py trains it")
    if quantizer == "simvq" and f"{LOSS}.commit_weight" in values:  # which only train_vqrae.py reads
        fields["optimizer.quantizer_rate"] = 0.0
    elif quantizer == "simvq":
        notes.append("optimizer.quantizer_rate: SimVQ's projections train; 0 trains as train_vqrae.py does")
    if "training.global_batch_size" not in values:
        notes.append("training.batch_size: is that of one process; multiply data.batch_size by their number")
    if fields["optimizer.weight_decay"] != 0:
        notes.append("training.optimizer.weight_decay: is for kernels here, and for all parameters in PyTorch")
    notes += [f"{key}: is {x!r} here" for key, x in CONSTANT.items() if values.get(key, x) != x]
    if not _number(values, f"{LOSS}.disc_weight", 0.0):
        notes += [f"{key}: has no effect without {LOSS}.disc_weight" for key in values if key.startswith(DISC)]
        return {name: value for name, value in fields.items() if not name.startswith("adversary.")}
    start, norm = values.get(f"{LOSS}.disc_start", 0), fields.get("adversary.norm", "bn")
    fields |= {"adversary.discriminator": "dino", "adversary.norm": {"bn": "batch", "gn": "group"}.get(str(norm), norm)}
    fields = {"adversary.start_epochs": start, "adversary.window": 3} | fields
    fields["adversary.generator_start_epochs"] = start
    return fields | _convert_optimizer(values, DISC)


def _convert_optimizer(values: Values, section: str) -> Values:
    """Returns the fields of one AdamW and its schedule, with the values of absent keys."""
    scheduled = any(key.startswith(f"{section}.scheduler.") for key in values)
    betas = values.get(f"{section}.optimizer.betas", (0.9, 0.95))
    b1, b2 = betas if isinstance(betas, list | tuple) and len(betas) == 2 else (betas, betas)
    fields = {"learning_rate": 2e-4, "weight_decay": 0.0, "schedule": "linear" if scheduled else "constant"}
    fields |= {name: values[f"{section}.{key}"] for key, name in _OPTIMIZER.items() if f"{section}.{key}" in values}
    fields |= {"b1": b1, "b2": b2}
    fields.setdefault("final_learning_rate", fields["learning_rate"])
    for name in ("warmup", "decay_end"):  # steps take precedence in PyTorch, and epochs here
        if f"{name}_steps" in fields:
            fields.pop(f"{name}_epochs", None)
    if not any(name.startswith("decay_end") for name in fields):  # the schedule then ends with its warm-up
        warmup = [name for name in ("warmup_steps", "warmup_epochs") if name in fields]
        fields |= {name.replace("warmup", "decay_end"): fields[name] for name in warmup} or {"decay_end_steps": 0}
    return {f"{OPTIMIZERS[section]}.{name}": value for name, value in fields.items()}


def _flag(values: Values, name: str, default: bool) -> bool:
    if not isinstance(value := values.get(f"{MODEL}.{name}", default), bool):
        raise ConfigError("must be true or false", field=f"{MODEL}.{name}", value=value)
    return value


def _number(values: Values, key: str, default: float) -> float:
    if (value := values.get(key)) is None:
        return default
    try:
        return float("" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError("must be a number", field=key, value=value) from None


def _nest(fields: Values) -> Values:
    tree: Values = {}
    for path, value in fields.items():
        *sections, name = path.split(".")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return tree


def _differing(section: Section, default: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields path and value of the fields that differ from those of another section."""
    for name in type(section).model_fields:
        value, other = getattr(section, name), getattr(default, name)
        if isinstance(value, Section):
            yield from _differing(value, other, f"{prefix}{name}.")
        elif value != other:
            yield f"{prefix}{name}", value
