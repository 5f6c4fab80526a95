"""The encoder families: their tensor names, and their config.json as fields of our one ViT."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from vqrae_jax.errors import WeightsError
from vqrae_jax.pretrained.tables import DECODER_TABLE, Row, Table, dense, find, norm


@dataclasses.dataclass(frozen=True)
class Family:
    """What is needed to read one kind of encoder, and to write it for the origin."""

    model_types: tuple[str, ...]  # `model_type` of the config.json files that it reads
    table: Table  # onto the tree of models.encoder.Encoder
    describe: Callable[[dict[str, Any]], dict[str, Any]]  # config.json -> fields of ViTConfig, `blocks` nested
    origin: str  # where the origin's wrapper keeps the model: the prefix of its names in a training checkpoint
    tower: str = ""  # prefix in hub files that hold other networks beside it


def describe_dinov2(config: dict[str, Any]) -> dict[str, Any]:
    """Dinov2Model and Dinov2WithRegistersModel."""
    width, gated = config["hidden_size"], config["use_swiglu_ffn"]
    mlp = int(width * config["mlp_ratio"])
    registers = config["model_type"] == "dinov2_with_registers"
    # The SwiGLU hidden width is two thirds, rounded up to a multiple of eight.
    mlp = (int(mlp * 2 / 3) + 7) // 8 * 8 if gated else mlp
    act = "silu" if gated else activation(config)
    return {
        "blocks": {**_blocks(config), "mlp": mlp, "act": act, "gated": gated, "layer_scale": True},
        **_grid(config),
        "registers": config["num_register_tokens"] if registers else 0,
        "antialias": registers,
    }


def describe_dinov3(config: dict[str, Any]) -> dict[str, Any]:
    """DINOv3ViTModel; its image_size has no meaning, since positions are rotations."""
    if not (config["mlp_bias"] and config["proj_bias"]):
        raise WeightsError("a DINOv3 encoder without mlp_bias or proj_bias is not supported")
    unbiased = tuple(name for name in ("query", "key", "value") if not config[f"{name}_bias"])
    return {
        "blocks": {
            **_blocks(config),
            "mlp": config["intermediate_size"],
            "act": activation(config),
            "gated": config["use_gated_mlp"],
            "layer_scale": True,
            "unbiased": unbiased,
        },
        "patch": config["patch_size"],
        "pos": "rope",
        "rope_theta": config.get("rope_theta") or config["rope_parameters"]["rope_theta"],
        "registers": config["num_register_tokens"],
    }


def describe_siglip(config: dict[str, Any]) -> dict[str, Any]:
    """The vision tower of SiglipModel, alone or beside the text tower. SigLIP 2 of fixed resolution is the same."""
    config = config.get("vision_config", config)
    blocks = {**_blocks(config), "mlp": config["intermediate_size"], "act": activation(config)}
    return {"blocks": blocks, **_grid(config), "cls": False}


def describe_mae(config: dict[str, Any]) -> dict[str, Any]:
    """The encoder of ViTMAEForPreTraining, which here sees every patch."""
    if not config["qkv_bias"]:
        raise WeightsError("a MAE encoder without qkv_bias is not supported")
    blocks = {**_blocks(config), "mlp": config["intermediate_size"], "act": activation(config)}
    return {"blocks": blocks, **_grid(config)}


def activation(config: dict[str, Any]) -> str:
    """Our name of `hidden_act`."""
    names = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}
    if config["hidden_act"] not in names:
        raise WeightsError(f"hidden_act={config['hidden_act']!r} is not supported; known: {', '.join(names)}")
    return names[config["hidden_act"]]


def _blocks(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "norm_eps": config["layer_norm_eps"],
    }


def _grid(config: dict[str, Any]) -> dict[str, Any]:
    return {"patch": config["patch_size"], "grid": config["image_size"] // config["patch_size"]}


_BLOCK = "vit/block#/"

_LAYER = "encoder.layer.#."

DINOV2_TABLE: Table = [
    Row("embeddings.cls_token", "vit/cls"),
    Row("embeddings.mask_token", None, filler=(0.0, "1 D")),
    Row("embeddings.register_tokens", "vit/registers"),
    Row("embeddings.position_embeddings", "vit/pos_embed"),
    *dense("embeddings.patch_embeddings.projection", "vit/patch_embed"),
    *norm(_LAYER + "norm1", _BLOCK + "norm1"),
    *dense(_LAYER + "attention.(attention.query|q_proj)", _BLOCK + "attn/query"),
    *dense(_LAYER + "attention.(attention.key|k_proj)", _BLOCK + "attn/key"),
    *dense(_LAYER + "attention.(attention.value|v_proj)", _BLOCK + "attn/value"),
    *dense(_LAYER + "attention.(output.dense|o_proj)", _BLOCK + "attn/out"),
    Row(_LAYER + "layer_scale1.lambda1", _BLOCK + "scale1/scale"),
    *norm(_LAYER + "norm2", _BLOCK + "norm2"),
    *dense(_LAYER + "mlp.fc1", _BLOCK + "mlp/up", "plain"),
    *dense(_LAYER + "mlp.fc2", _BLOCK + "mlp/down", "plain"),
    *dense(_LAYER + "mlp.weights_in", _BLOCK + "mlp/{gate,up}", "gated 4"),
    *dense(_LAYER + "mlp.gate_proj", _BLOCK + "mlp/gate", "gated 5"),
    *dense(_LAYER + "mlp.up_proj", _BLOCK + "mlp/up", "gated 5"),
    *dense(_LAYER + "mlp.(weights_out|down_proj)", _BLOCK + "mlp/down", "gated"),
    Row(_LAYER + "layer_scale2.lambda1", _BLOCK + "scale2/scale"),
    *norm("layernorm", "norm"),
]

_LAYER = "(layer|model.layer).#."

DINOV3_TABLE: Table = [
    Row("embeddings.cls_token", "vit/cls"),
    Row("embeddings.mask_token", None, filler=(0.0, "1 1 D")),
    Row("embeddings.register_tokens", "vit/registers"),
    *dense("embeddings.patch_embeddings", "vit/patch_embed"),
    *norm(_LAYER + "norm1", _BLOCK + "norm1"),
    *dense(_LAYER + "attention.q_proj", _BLOCK + "attn/query"),
    *dense(_LAYER + "attention.k_proj", _BLOCK + "attn/key"),
    *dense(_LAYER + "attention.v_proj", _BLOCK + "attn/value"),
    *dense(_LAYER + "attention.o_proj", _BLOCK + "attn/out"),
    Row(_LAYER + "layer_scale1.lambda1", _BLOCK + "scale1/scale"),
    *norm(_LAYER + "norm2", _BLOCK + "norm2"),
    *dense(_LAYER + "mlp.gate_proj", _BLOCK + "mlp/gate"),
    *dense(_LAYER + "mlp.up_proj", _BLOCK + "mlp/up"),
    *dense(_LAYER + "mlp.down_proj", _BLOCK + "mlp/down"),
    Row(_LAYER + "layer_scale2.lambda1", _BLOCK + "scale2/scale"),
    # The origin means to drop this scale and bias and applies them: where we dropped them it must get the identity.
    Row("norm.weight", "norm/scale", filler=(1.0, "D")),
    Row("norm.bias", "norm/bias", filler=(0.0, "D")),
]

_LAYER = "encoder.layers.#."

SIGLIP_TABLE: Table = [
    Row("embeddings.position_embedding.weight", "vit/pos_embed[0]"),
    *dense("embeddings.patch_embedding", "vit/patch_embed"),
    *norm(_LAYER + "layer_norm1", _BLOCK + "norm1"),
    *dense(_LAYER + "self_attn.q_proj", _BLOCK + "attn/query"),
    *dense(_LAYER + "self_attn.k_proj", _BLOCK + "attn/key"),
    *dense(_LAYER + "self_attn.v_proj", _BLOCK + "attn/value"),
    *dense(_LAYER + "self_attn.out_proj", _BLOCK + "attn/out"),
    *norm(_LAYER + "layer_norm2", _BLOCK + "norm2"),
    *dense(_LAYER + "mlp.fc1", _BLOCK + "mlp/up"),
    *dense(_LAYER + "mlp.fc2", _BLOCK + "mlp/down"),
    *norm("post_layernorm", "norm"),
    # The pooling head that contrastive training uses: the origin holds it and never calls it.
    Row("head.probe", None, filler=(0.0, "1 1 D")),
    Row("head.attention.in_proj_weight", None, filler=(0.0, "3D D")),
    Row("head.attention.in_proj_bias", None, filler=(0.0, "3D")),
    Row("head.attention.out_proj.weight", None, filler=(0.0, "D D")),
    Row("head.attention.out_proj.bias", None, filler=(0.0, "D")),
    Row("head.layernorm.weight", None, filler=(1.0, "D")),
    Row("head.layernorm.bias", None, filler=(0.0, "D")),
    Row("head.mlp.fc1.weight", None, filler=(0.0, "M D")),
    Row("head.mlp.fc1.bias", None, filler=(0.0, "M")),
    Row("head.mlp.fc2.weight", None, filler=(0.0, "D M")),
    Row("head.mlp.fc2.bias", None, filler=(0.0, "D")),
    Row("text_model.*", None),
    Row("logit_scale", None),
    Row("logit_bias", None),
]

_LAYER = "(encoder.layer|layers).#."

MAE_TABLE: Table = [
    Row("embeddings.cls_token", "vit/cls"),
    Row("embeddings.position_embeddings", "vit/pos_embed"),
    *dense("embeddings.patch_embeddings.projection", "vit/patch_embed"),
    *norm(_LAYER + "layernorm_before", _BLOCK + "norm1"),
    *dense(_LAYER + "attention.(attention.query|q_proj)", _BLOCK + "attn/query"),
    *dense(_LAYER + "attention.(attention.key|k_proj)", _BLOCK + "attn/key"),
    *dense(_LAYER + "attention.(attention.value|v_proj)", _BLOCK + "attn/value"),
    *dense(_LAYER + "attention.(output.dense|o_proj)", _BLOCK + "attn/out"),
    *norm(_LAYER + "layernorm_after", _BLOCK + "norm2"),
    *dense(_LAYER + "(intermediate.dense|mlp.fc1)", _BLOCK + "mlp/up"),
    *dense(_LAYER + "(output.dense|mlp.fc2)", _BLOCK + "mlp/down"),
    *norm("layernorm", "norm"),
    Row("decoder.*", None),
]


def describe(family: Family, config: dict[str, Any], source: str) -> dict[str, Any]:
    """`family.describe` with the numbers checked.

    Raises:
      WeightsError: config.json lacks a field or gives a network that cannot be.
    """
    try:
        fields = family.describe(config)
        blocks = fields["blocks"]
        width, depth, heads = blocks["width"], blocks["depth"], blocks["heads"]
        numbers = {
            "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads,
            "the width of the mlp": blocks["mlp"], "patch_size": fields["patch"],
        }  # fmt: skip
        for name, number in numbers.items():
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} is {number!r}, expected a whole number from 1")
        if width % heads:
            raise ValueError(f"hidden_size={width} is not divisible by num_attention_heads={heads}")
        if fields.get("pos") != "rope" and fields["grid"] < 1:
            raise ValueError(f"image_size={config.get('image_size')} holds no patch")
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from None
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise WeightsError(f"the config.json of {source} describes no encoder of this kind ({reason})") from error
    return fields


FAMILIES = {
    "Dinov2withNorm": Family(
        ("dinov2", "dinov2_with_registers"), DINOV2_TABLE, describe_dinov2, origin="encoder.encoder."
    ),
    "Dinov3withNorm": Family(("dinov3_vit",), DINOV3_TABLE, describe_dinov3, origin="encoder.encoder."),
    "SigLIP2wNorm": Family(
        ("siglip_vision_model", "siglip"), SIGLIP_TABLE, describe_siglip, "encoder.model.", tower="vision_model."
    ),
    "MAEwNorm": Family(("vit_mae",), MAE_TABLE, describe_mae, origin="encoder.model.", tower="vit."),
}


A_DECODER = "a decoder"


def looks_like(names: Iterable[str]) -> str | None:
    """What has these tensor names: an `encoder_cls`, A_DECODER, or None where none fits most of them."""
    names = list(names)

    def known(table: Table, prefix: str) -> int:
        found = (find(table, name.removeprefix(prefix)) for name in names)
        return sum(1 for hit in found if hit and hit[1])

    scores = {name: known(family.table, family.tower) for name, family in FAMILIES.items()}
    scores[A_DECODER] = known(DECODER_TABLE, "decoder.")
    best = max(scores, key=scores.__getitem__)
    return best if scores[best] > len(names) / 2 else None
