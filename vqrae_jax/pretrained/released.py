"""What the encoders of our configs are made of: fields of their hub config.json.

By these a model can be described, counted and compiled where there is no hub.
"""

from typing import Any

ARCHITECTURES = {
    "facebook/dinov2-with-registers-small": {
        "model_type": "dinov2_with_registers",
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "image_size": 518,
        "patch_size": 14,
        "num_register_tokens": 4,
    },
    "facebook/dinov2-with-registers-base": {
        "model_type": "dinov2_with_registers",
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 518,
        "patch_size": 14,
        "num_register_tokens": 4,
    },
    "facebook/dinov2-with-registers-large": {
        "model_type": "dinov2_with_registers",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 518,
        "patch_size": 14,
        "num_register_tokens": 4,
    },
    "facebook/dinov3-vitb16-pretrain-lvd1689m": {
        "model_type": "dinov3_vit",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
        "num_register_tokens": 4,
    },
    "facebook/dinov3-vitl16-pretrain-lvd1689m": {
        "model_type": "dinov3_vit",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 16,
        "num_register_tokens": 4,
    },
    "google/siglip2-base-patch16-256": {
        "model_type": "siglip_vision_model",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 256,
        "patch_size": 16,
    },
    "google/siglip2-base-patch16-512": {
        "model_type": "siglip_vision_model",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 512,
        "patch_size": 16,
    },
    "google/siglip2-large-patch16-256": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 256,
        "patch_size": 16,
    },
    "google/siglip2-large-patch16-512": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 512,
        "patch_size": 16,
    },
    "facebook/vit-mae-base": {
        "model_type": "vit_mae",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
    },
}


def _dino(width: int, patch: int) -> dict[str, Any]:
    blocks = {"width": width, "depth": 12, "heads": width // 64, "mlp": 4 * width, "act": "gelu_tanh"}
    return {"blocks": blocks, "patch": patch, "grid": 224 // patch}


# Trunks of the discriminator: fields of models.vit.ViTConfig.
DINO = {
    "facebook/dino-vits8": _dino(384, 8),
    "facebook/dino-vits16": _dino(384, 16),
    "facebook/dino-vitb8": _dino(768, 8),
    "facebook/dino-vitb16": _dino(768, 16),
}
