"""VQRAE on a frozen DINOv3-L: 256 tokens per image at 256 pixels, a codebook of 8,192, L1 loss.

A start for experiments with encoders and losses, in bfloat16; the full recipe is configs/vqrae_dinov2_b.py.
The decoder is ViT-XL at 256 pixels; --config=configs/dinov3_l.py:ViT-L,512 selects another decoder and image size.
Requires --config.data.path and a login to the model hub, which gates these weights.
"""

from vqrae_jax import config
from vqrae_jax.config import recipes


def get_config(decoder_and_size="ViT-XL,256"):
    decoder, pixels = config.parse_decoder_and_size(decoder_and_size)
    c = config.defaults()
    c.model.encoder_cls = "Dinov3withNorm"
    c.model.encoder_config_path = "facebook/dinov3-vitl16-pretrain-lvd1689m"
    c.model.encoder_input_size = pixels
    c.model.decoder_config_path = decoder
    c.data.image_size = pixels
    recipes.half_precision(c)
    return c
