"""Architectures of the pretrained networks in our configs, so that models can be built without the hub."""

from typing import Any

_DEPTH_AND_HEADS = {384: (12, 6), 768: (12, 12), 1024: (24, 16)}  # of a ViT, by width


def _config(model_type: str, width: int, image_size: int, patch: int, **fields: Any) -> dict[str, Any]:
    depth, heads = _DEPTH_AND_HEADS[width]
    if not model_type.startswith("dinov2"):
        fields["intermediate_size"] = 4 * width
    return {
        "model_type": model_type, "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads,
        "image_size": image_size, "patch_size": patch, **fields,
    }  # fmt: skip


def _dino(width: int, patch: int) -> dict[str, Any]:
    blocks = {"width": width, "depth": 12, "heads": width // 64, "mlp": 4 * width, "act": "gelu_tanh"}
    return {"blocks": blocks, "patch": patch, "grid": 224 // patch}


# Encoders: the fields of their hub config.json that differ from transformers' defaults.
ARCHITECTURES = {
    "facebook/dinov2-with-registers-small": _config("dinov2_with_registers", 384, 518, 14, num_register_tokens=4),
    "facebook/dinov2-with-registers-base": _config("dinov2_with_registers", 768, 518, 14, num_register_tokens=4),
    "facebook/dinov2-with-registers-large": _config("dinov2_with_registers", 1024, 518, 14, num_register_tokens=4),
    "facebook/dinov3-vitb16-pretrain-lvd1689m": _config("dinov3_vit", 768, 224, 16, num_register_tokens=4),
    "facebook/dinov3-vitl16-pretrain-lvd1689m": _config("dinov3_vit", 1024, 224, 16, num_register_tokens=4),
    "google/siglip2-base-patch16-256": _config("siglip_vision_model", 768, 256, 16),
    "google/siglip2-base-patch16-512": _config("siglip_vision_model", 768, 512, 16),
    "google/siglip2-large-patch16-256": _config("siglip_vision_model", 1024, 256, 16),
    "google/siglip2-large-patch16-512": _config("siglip_vision_model", 1024, 512, 16),
    "facebook/vit-mae-base": _config("vit_mae", 768, 224, 16),
}

# Trunks of the discriminator: fields of models.vit.ViTConfig.
DINO = {
    "facebook/dino-vits8": _dino(384, 8),
    "facebook/dino-vits16": _dino(384, 16),
    "facebook/dino-vitb8": _dino(768, 8),
    "facebook/dino-vitb16": _dino(768, 16),
}
