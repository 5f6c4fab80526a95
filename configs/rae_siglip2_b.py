"""The released continuous RAE on SigLIP 2-B and its ViT-XL decoder; no quantizer.

The released files are in PyTorch format; reading them requires the torch extra.
"""

from vqrae_jax import config

REPOSITORY = "nyu-visionx/RAE-collections"


def get_config():
    c = config.defaults()
    c.model.encoder_cls = "SigLIP2wNorm"
    c.model.encoder_config_path = "google/siglip2-base-patch16-256"
    c.model.encoder_input_size = 256
    c.model.decoder_config_path = "ViT-XL"
    c.model.pretrained_decoder_path = f"{REPOSITORY}/decoders/siglip2/base_p16_i256/ViTXL_n08/model.pt"
    c.model.normalization_stat_path = f"{REPOSITORY}/stats/siglip2/base_p16_i256/ImageNet1k/stat.pt"
    c.model.quantizer = "none"
    return c
