"""The released continuous RAE on MAE-B and its ViT-XL decoder; no quantizer.

The released files are in PyTorch format; reading them requires the torch extra.
"""

from vqrae_jax import config

REPOSITORY = "nyu-visionx/RAE-collections"


def get_config():
    c = config.defaults()
    c.model.encoder_cls = "MAEwNorm"
    c.model.encoder_config_path = "facebook/vit-mae-base"
    c.model.encoder_input_size = 256
    c.model.decoder_config_path = "ViT-XL"
    c.model.pretrained_decoder_path = f"{REPOSITORY}/decoders/mae/base_p16/ViTXL_n08/model.pt"
    c.model.normalization_stat_path = f"{REPOSITORY}/stats/mae/base_p16/ImageNet1k/stat.pt"
    c.model.quantizer = "none"
    return c
