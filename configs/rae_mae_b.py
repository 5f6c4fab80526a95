"""The released continuous RAE on MAE-B and its ViT-XL decoder; no quantizer.

Training continues from the released decoder with the losses, the noise and the schedule of RAE, see
`vqrae_jax.config.recipes.rae_stage1`; --config.model.pretrained_decoder_path="" starts from a random one, as RAE did.
The released files are in PyTorch format; reading them requires the torch extra.
"""

from vqrae_jax import config
from vqrae_jax.config import recipes

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
    c.model.noise_tau = 0.8
    recipes.rae_stage1(c)
    return c
