"""VQRAE on DINOv3-B.

Decoder and picture size: --config=configs/dinov3_b.py:ViT-L,512 (else ViT-XL,256).
The hub asks for a log-in before it gives these weights.
"""

from vqrae_jax import config


def get_config(parse_decoder_and_size="ViT-XL,256"):
    decoder, pixels = config.parse_decoder_and_size(parse_decoder_and_size)
    c = config.defaults()
    c.model.encoder_cls = "Dinov3withNorm"
    c.model.encoder_config_path = "facebook/dinov3-vitb16-pretrain-lvd1689m"
    c.model.encoder_input_size = pixels
    c.model.decoder_config_path = decoder
    c.data.image_size = pixels
    return c
