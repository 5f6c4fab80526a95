"""VQRAE on SigLIP 2-L of fixed resolution.

Decoder and picture size: --config=configs/siglip2_l.py:ViT-L,512 (else ViT-XL,256).
"""

from vqrae_jax import config


def get_config(parse_decoder_and_size="ViT-XL,256"):
    decoder, pixels = config.parse_decoder_and_size(parse_decoder_and_size)
    c = config.defaults()
    c.model.encoder_cls = "SigLIP2wNorm"
    c.model.encoder_config_path = f"google/siglip2-large-patch16-{pixels}"
    c.model.encoder_input_size = pixels
    c.model.decoder_config_path = decoder
    c.data.image_size = pixels
    return c
