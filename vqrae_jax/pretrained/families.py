"""Encoder families: their tensor names, and their config.json as fields of our ViT."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from vqrae_jax.errors import WeightsError
from vqrae_jax.pretrained import tables
from vqrae_jax.pretrained.tables import DECODER_TABLE, Row, Table, attention_rows, dense_rows, norm_rows

DECODER = "a decoder"
QKV = ("query", "key", "value")
# Values of `hidden_act` in transformers, and the names of the same functions in `models.layers`.
ACTIVATIONS = {name: name for name in ("gelu", "silu", "relu", "relu6", "leaky_relu", "quick_gelu", "mish", "tanh")} | {
    "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh", "swish": "silu",
}  # fmt: skip

_VIT = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "hidden_act": "gelu", "image_size": 224, "patch_size": 16,
}  # fmt: skip
_DINOV2 = _VIT | {"mlp_ratio": 4, "use_swiglu_ffn": False, "layer_norm_eps": 1e-6, "qkv_bias": True}
_MAE = _VIT | {"layer_norm_eps": 1e-12, "qkv_bias": True}
_SIGLIP = _VIT | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
# Files on the hub leave out values that equal transformers' defaults: those by `model_type`, of the fields read below.
DEFAULTS = {
    "dinov2": _DINOV2 | {"patch_size": 14},
    "dinov2_with_registers": _DINOV2 | {"num_register_tokens": 4},
    "dinov3_vit": _VIT | {
        "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "layer_norm_eps": 1e-5,
        "num_register_tokens": 0, "use_gated_mlp": False, "mlp_bias": True, "proj_bias": True, "query_bias": True,
        "key_bias": False, "value_bias": True, "rope_parameters": {"rope_theta": 100.0},
    },
    "siglip": {"vision_config": {}},
    "siglip_vision_model": _SIGLIP,
    "vit_mae": _MAE,
    "vit": _MAE,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Family:
    """Names and settings of one kind of encoder."""

    model_types: tuple[str, ...]  # accepted values of `model_type` in config.json
    table: Table  # onto the tree of models.encoder.Encoder
    describe: Callable[[dict[str, Any]], dict[str, Any]]  # config.json -> fields of ViTConfig, `blocks` nested
    prefix: str  # of the encoder's names in a training checkpoint of the PyTorch VQRAE


def describe_dinov2(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the ViT fields of Dinov2Model and Dinov2WithRegistersModel."""
    gated, mlp = config["use_swiglu_ffn"], int(config["hidden_size"] * config["mlp_ratio"])
    config = config | {"intermediate_size": mlp}
    if gated:  # the hidden width of SwiGLU is two thirds, rounded up to a multiple of eight
        config |= {"intermediate_size": (int(mlp * 2 / 3) + 7) // 8 * 8, "hidden_act": "silu"}
    registers = config["model_type"] == "dinov2_with_registers"
    return {
        **_vit(config, gated=gated, layer_scale=True, unbiased=list_unbiased(config, qkv_bias=QKV)),
        "registers": config["num_register_tokens"] if registers else 0,
        "antialias": registers,
    }


def describe_dinov3(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the ViT fields of DINOv3ViTModel. Positions are rotations, so its image_size is ignored."""
    layers = {f"{name}_bias": (name,) for name in QKV} | {"proj_bias": ("out",), "mlp_bias": ("gate", "up", "down")}
    attention_and_mlp = {"gated": config["use_gated_mlp"], "unbiased": list_unbiased(config, **layers)}
    fields = _vit(config | {"image_size": 0}, layer_scale=True, **attention_and_mlp)
    del fields["grid"]
    return fields | {
        "pos": "rope",
        "rope_theta": config.get("rope_theta") or config["rope_parameters"]["rope_theta"],
        "registers": config["num_register_tokens"],
    }


def describe_siglip(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the ViT fields of the vision tower of SigLIP or fixed-resolution SigLIP 2, with or without text tower."""
    return _vit(_SIGLIP | config.get("vision_config", config)) | {"cls": False}


def describe_mae(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the ViT fields of ViTModel and of the encoder of ViTMAEForPreTraining; nothing is masked here."""
    return _vit(config, unbiased=list_unbiased(config, qkv_bias=QKV))


def activation(config: dict[str, Any]) -> str:
    """Returns our name for the activation `hidden_act`."""
    if config["hidden_act"] not in ACTIVATIONS:
        raise WeightsError(f"hidden_act={config['hidden_act']!r} is not supported; expected {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[config["hidden_act"]]


def list_unbiased(config: dict[str, Any], **layers: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the layers without bias; `layers` are those that each field of the config switches."""
    return tuple(layer for field, names in layers.items() if not config[field] for layer in names)


def _vit(config: dict[str, Any], **block_fields: Any) -> dict[str, Any]:
    """Returns the fields that all families share."""
    blocks = {
        "width": config["hidden_size"], "depth": config["num_hidden_layers"], "heads": config["num_attention_heads"],
        "mlp": config["intermediate_size"], "act": activation(config),
        "norm_eps": config["layer_norm_eps"], **block_fields,
    }  # fmt: skip
    patch = config["patch_size"]
    return {"blocks": blocks, "patch": patch, "grid": config["image_size"] // patch}


_BLOCK = "vit/block#/"
# The attention of DINOv2 and MAE in transformers 4 and 5.
_PROJECTIONS = "(attention.query|q_proj) (attention.key|k_proj) (attention.value|v_proj) (output.dense|o_proj)"

# Heads of fine-tuned models, which are not used.
_HEADS: Table = [Row(f"{name}.*", None) for name in ("classifier", "pooler")]

_LAYER = "encoder.layer.#."

DINOV2_TABLE: Table = [
    Row("embeddings.cls_token", "vit/cls"),
    Row("embeddings.mask_token", None, filler=(0.0, "1 D")),
    Row("embeddings.register_tokens", "vit/registers"),
    Row("embeddings.position_embeddings", "vit/pos_embed"),
    *dense_rows("embeddings.patch_embeddings.projection", "vit/patch_embed"),
    *norm_rows(_LAYER + "norm1", _BLOCK + "norm1"),
    *attention_rows(_LAYER + "attention.", _PROJECTIONS, _BLOCK + "attn"),
    Row(_LAYER + "layer_scale1.lambda1", _BLOCK + "scale1/scale"),
    *norm_rows(_LAYER + "norm2", _BLOCK + "norm2"),
    *dense_rows(_LAYER + "mlp.fc1", _BLOCK + "mlp/up", "plain"),
    *dense_rows(_LAYER + "mlp.fc2", _BLOCK + "mlp/down", "plain"),
    *dense_rows(_LAYER + "mlp.weights_in", _BLOCK + "mlp/{gate,up}", "gated 4"),
    *dense_rows(_LAYER + "mlp.gate_proj", _BLOCK + "mlp/gate", "gated 5"),
    *dense_rows(_LAYER + "mlp.up_proj", _BLOCK + "mlp/up", "gated 5"),
    *dense_rows(_LAYER + "mlp.(weights_out|down_proj)", _BLOCK + "mlp/down", "gated"),
    Row(_LAYER + "layer_scale2.lambda1", _BLOCK + "scale2/scale"),
    *norm_rows("layernorm", "norm"),
    *_HEADS,
]

_LAYER = "(layer|model.layer).#."

DINOV3_TABLE: Table = [
    Row("embeddings.cls_token", "vit/cls"),
    Row("embeddings.mask_token", None, filler=(0.0, "1 1 D")),
    Row("embeddings.register_tokens", "vit/registers"),
    *dense_rows("embeddings.patch_embeddings", "vit/patch_embed"),
    *norm_rows(_LAYER + "norm1", _BLOCK + "norm1"),
    *attention_rows(_LAYER + "attention.", "q_proj k_proj v_proj o_proj", _BLOCK + "attn"),
    Row(_LAYER + "layer_scale1.lambda1", _BLOCK + "scale1/scale"),
    *norm_rows(_LAYER + "norm2", _BLOCK + "norm2"),
    *dense_rows(_LAYER + "mlp.gate_proj", _BLOCK + "mlp/gate"),
    *dense_rows(_LAYER + "mlp.up_proj", _BLOCK + "mlp/up"),
    *dense_rows(_LAYER + "mlp.down_proj", _BLOCK + "mlp/down"),
    Row(_LAYER + "layer_scale2.lambda1", _BLOCK + "scale2/scale"),
    # The PyTorch VQRAE applies this scale and bias even where it is meant to drop them. Where we have dropped them, its
    # file needs the identity.
    Row("norm.weight", "norm/scale", filler=(1.0, "D")),
    Row("norm.bias", "norm/bias", filler=(0.0, "D")),
    *_HEADS,
]

_LAYER = "encoder.layers.#."

SIGLIP_TABLE: Table = [
    Row("embeddings.position_embedding.weight", "vit/pos_embed[0]"),
    *dense_rows("embeddings.patch_embedding", "vit/patch_embed"),
    *norm_rows(_LAYER + "layer_norm1", _BLOCK + "norm1"),
    *attention_rows(_LAYER + "self_attn.", "q_proj k_proj v_proj out_proj", _BLOCK + "attn"),
    *norm_rows(_LAYER + "layer_norm2", _BLOCK + "norm2"),
    *dense_rows(_LAYER + "mlp.fc1", _BLOCK + "mlp/up"),
    *dense_rows(_LAYER + "mlp.fc2", _BLOCK + "mlp/down"),
    *norm_rows("post_layernorm", "norm"),
    # The pooling head of contrastive training: the PyTorch VQRAE has its parameters but never calls it.
    *(
        Row(f"head.{name}", None, filler=(value, shape))
        for name, value, shape in (
            ("probe", 0.0, "1 1 D"),
            ("attention.in_proj_weight", 0.0, "3D D"),
            ("attention.in_proj_bias", 0.0, "3D"),
            ("attention.out_proj.weight", 0.0, "D D"),
            ("attention.out_proj.bias", 0.0, "D"),
            ("layernorm.weight", 1.0, "D"),
            ("layernorm.bias", 0.0, "D"),
            ("mlp.fc1.weight", 0.0, "M D"),
            ("mlp.fc1.bias", 0.0, "M"),
            ("mlp.fc2.weight", 0.0, "D M"),
            ("mlp.fc2.bias", 0.0, "D"),
        )
    ),
    *(Row(name, None) for name in ("text_model.*", "logit_scale", "logit_bias")),
    *_HEADS,
]

_LAYER = "(encoder.layer|layers).#."

MAE_TABLE: Table = [
    Row("embeddings.cls_token", "vit/cls"),
    Row("embeddings.position_embeddings", "vit/pos_embed"),
    *dense_rows("embeddings.patch_embeddings.projection", "vit/patch_embed"),
    *norm_rows(_LAYER + "layernorm_before", _BLOCK + "norm1"),
    *attention_rows(_LAYER + "attention.", _PROJECTIONS, _BLOCK + "attn"),
    *norm_rows(_LAYER + "layernorm_after", _BLOCK + "norm2"),
    *dense_rows(_LAYER + "(intermediate.dense|mlp.fc1)", _BLOCK + "mlp/up"),
    *dense_rows(_LAYER + "(output.dense|mlp.fc2)", _BLOCK + "mlp/down"),
    *norm_rows("layernorm", "norm"),
    *(Row(name, None) for name in ("embeddings.mask_token", "decoder.*")),
    *_HEADS,
]


def describe(family: Family, config: dict[str, Any], source: str) -> dict[str, Any]:
    """Returns `family.describe(config)` after checking its numbers.

    Args:
      family: kind of the encoder.
      config: config.json of a hub folder; DEFAULTS complete it.
      source: the folder, hub id or config field, for messages.
    """
    try:
        fields = family.describe(complete(config))
        blocks = fields["blocks"]
        width, depth, heads = blocks["width"], blocks["depth"], blocks["heads"]
        numbers = {
            "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads,
            "the width of the mlp": blocks["mlp"], "patch_size": fields["patch"],
        }  # fmt: skip
        for name, number in numbers.items():
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} is {number!r}, expected a positive integer")
        if width % heads:
            raise ValueError(f"hidden_size={width} is not divisible by num_attention_heads={heads}")
        if fields.get("pos") != "rope" and fields["grid"] < 1:
            raise ValueError(f"image_size={config.get('image_size')} is smaller than one patch")
    except WeightsError as error:
        raise WeightsError(f"{source}: {error.message}") from None
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise WeightsError(
            f"the config.json of {source} does not describe an encoder of this kind ({reason})"
        ) from error
    return fields


def complete(config: dict[str, Any], defaults: dict[str, Any] | None = None) -> dict[str, Any]:
    """Adds the defaults, those of its model_type, to config.json; raises ValueError for values of other types."""
    defaults = DEFAULTS[config["model_type"]] if defaults is None else defaults
    for name in defaults.keys() & config.keys():
        kind = (int, float) if type(defaults[name]) in (int, float) else type(defaults[name])
        if not isinstance(config[name], kind):
            raise ValueError(f"{name} is {config[name]!r}, expected a value such as {defaults[name]!r}")
    return defaults | config


FAMILIES = {
    "Dinov2withNorm": Family(
        ("dinov2", "dinov2_with_registers"), DINOV2_TABLE, describe_dinov2, prefix="encoder.encoder."
    ),
    "Dinov3withNorm": Family(("dinov3_vit",), DINOV3_TABLE, describe_dinov3, prefix="encoder.encoder."),
    "SigLIP2wNorm": Family(("siglip_vision_model", "siglip"), SIGLIP_TABLE, describe_siglip, prefix="encoder.model."),
    "MAEwNorm": Family(("vit_mae", "vit"), MAE_TABLE, describe_mae, prefix="encoder.model."),
}


def guess_kind(names: Iterable[str]) -> str | None:
    """Returns the `encoder_cls`, or DECODER, whose table has more than half of these tensor names; otherwise None."""
    names = list(names)

    def count_matches(table: Table) -> int:
        prefix = tables.find_prefix(table, names)
        rows = (tables.find_row(table, tables.strip_prefix(name, prefix)) for name in names)
        return sum(1 for row in rows if row and row[1])

    scores = {name: count_matches(family.table) for name, family in FAMILIES.items()}
    scores[DECODER] = count_matches(DECODER_TABLE)
    best = max(scores, key=scores.__getitem__)
    return best if scores[best] > len(names) / 2 else None
