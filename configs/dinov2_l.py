"""VQRAE on DINOv2-L with registers.

Decoder and picture size: --config=configs/dinov2_l.py:ViT-L,512 (else ViT-XL,256).
"""

from vqrae_jax import config


def get_config(parse_decoder_and_size="ViT-XL,256"):
    decoder, pixels = config.parse_decoder_and_size(parse_decoder_and_size)
    c = config.defaults()
    c.model.encoder_cls = "Dinov2withNorm"
    c.model.encoder_config_path = "facebook/dinov2-with-registers-large"
    c.model.encoder_input_size = pixels // 16 * 14  # the same grid as of 16-pixel patches
    c.model.decoder_config_path = decoder
    c.data.image_size = pixels
    return c
