"""Other people's tensor names -> our parameter paths, one table per family; and their config.json -> our ViT's fields.

A row is (pattern of the file's tensor name, path in our tree). In a path, #1 is the first group of the pattern as two
digits, {a,b} cuts a fused tensor into equal parts along its first axis, and None marks a tensor that is known and not
wanted. Tables follow the names in hub files; the names in memory of transformers 5 are accepted beside them, because
training checkpoints of the origin carry those.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

Table = list[tuple[str, str | None]]


class PretrainedError(ValueError):
    """Weights or their description cannot be used; the message names the file and what to do."""


@dataclasses.dataclass(frozen=True)
class Family:
    """What is needed to read one kind of encoder."""

    model_types: tuple[str, ...]  # `model_type` of the config.json files that it reads
    table: Table  # onto the tree of models.encoder.Encoder
    describe: Callable[[dict[str, Any]], dict[str, Any]]  # config.json -> fields of ViTConfig, `blocks` nested


def dense(source: str, target: str) -> Table:
    return [(source + r"\.weight", target + "/kernel"), (source + r"\.bias", target + "/bias")]


def norm(source: str, target: str) -> Table:
    return [(source + r"\.weight", target + "/scale"), (source + r"\.bias", target + "/bias")]


_LAYER = r"(?:encoder\.|model\.)?layer\.(\d+)\."
_BLOCK = "vit/block#1/"

DINOV2_TABLE: Table = [
    (r"embeddings\.cls_token", "vit/cls"),
    (r"embeddings\.mask_token", None),
    (r"embeddings\.register_tokens", "vit/registers"),
    (r"embeddings\.position_embeddings", "vit/pos_embed"),
    *dense(r"embeddings\.patch_embeddings\.projection", "vit/patch_embed"),
    *norm(_LAYER + "norm1", _BLOCK + "norm1"),
    *dense(_LAYER + r"attention\.(?:attention\.query|q_proj)", _BLOCK + "attn/query"),
    *dense(_LAYER + r"attention\.(?:attention\.key|k_proj)", _BLOCK + "attn/key"),
    *dense(_LAYER + r"attention\.(?:attention\.value|v_proj)", _BLOCK + "attn/value"),
    *dense(_LAYER + r"attention\.(?:output\.dense|o_proj)", _BLOCK + "attn/out"),
    (_LAYER + r"layer_scale1\.lambda1", _BLOCK + "scale1/scale"),
    *norm(_LAYER + "norm2", _BLOCK + "norm2"),
    *dense(_LAYER + r"mlp\.fc1", _BLOCK + "mlp/up"),
    *dense(_LAYER + r"mlp\.fc2", _BLOCK + "mlp/down"),
    *dense(_LAYER + r"mlp\.weights_in", _BLOCK + "mlp/{gate,up}"),
    *dense(_LAYER + r"mlp\.weights_out", _BLOCK + "mlp/down"),
    (_LAYER + r"layer_scale2\.lambda1", _BLOCK + "scale2/scale"),
    *norm("layernorm", "norm"),
]


def describe_dinov2(config: dict[str, Any]) -> dict[str, Any]:
    """Dinov2Model and Dinov2WithRegistersModel."""
    width, gated = config["hidden_size"], config["use_swiglu_ffn"]
    mlp = int(width * config["mlp_ratio"])
    registers = config["model_type"] == "dinov2_with_registers"
    return {
        "blocks": {
            "width": width,
            "depth": config["num_hidden_layers"],
            "heads": config["num_attention_heads"],
            # The SwiGLU hidden width is two thirds, rounded up to a multiple of eight.
            "mlp": (int(mlp * 2 / 3) + 7) // 8 * 8 if gated else mlp,
            "gated": gated,
            "act": "silu" if gated else activation(config),
            "layer_scale": True,
            "norm_eps": config["layer_norm_eps"],
        },
        "patch": config["patch_size"],
        "grid": config["image_size"] // config["patch_size"],
        "registers": config["num_register_tokens"] if registers else 0,
        "antialias": registers,
    }


def activation(config: dict[str, Any]) -> str:
    """Our name of `hidden_act`."""
    names = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}
    if config["hidden_act"] not in names:
        raise PretrainedError(f"hidden_act={config['hidden_act']!r} is not supported; known: {', '.join(names)}")
    return names[config["hidden_act"]]


FAMILIES = {
    "Dinov2withNorm": Family(("dinov2", "dinov2_with_registers"), DINOV2_TABLE, describe_dinov2),
}

_DECODER_BLOCK = r"decoder_layers\.(\d+)\."

# GeneralDecoder of the origin (RAE releases hold exactly these names).
DECODER_TABLE: Table = [
    *dense("decoder_embed", "embed"),
    (r"decoder_pos_embed", "pos_embed"),
    (r"trainable_cls_token", "cls"),
    *norm(_DECODER_BLOCK + "layernorm_before", "block#1/norm1"),
    *dense(_DECODER_BLOCK + r"attention\.(?:attention\.query|q_proj)", "block#1/attn/query"),
    *dense(_DECODER_BLOCK + r"attention\.(?:attention\.key|k_proj)", "block#1/attn/key"),
    *dense(_DECODER_BLOCK + r"attention\.(?:attention\.value|v_proj)", "block#1/attn/value"),
    *dense(_DECODER_BLOCK + r"attention\.(?:output\.dense|o_proj)", "block#1/attn/out"),
    *norm(_DECODER_BLOCK + "layernorm_after", "block#1/norm2"),
    *dense(_DECODER_BLOCK + r"(?:intermediate\.dense|mlp\.fc1)", "block#1/mlp/up"),
    *dense(_DECODER_BLOCK + r"(?:output\.dense|mlp\.fc2)", "block#1/mlp/down"),
    *norm("decoder_norm", "norm"),
    *dense("decoder_pred", "pred"),
]
