"""VQRAE on a frozen SigLIP 2-B (fixed resolution): 256 tokens per image at 256 pixels, a codebook of 8,192, L1 loss.

A start for experiments with encoders and losses, in bfloat16; the full recipe is configs/vqrae_dinov2_b.py.
The decoder is ViT-XL at 256 pixels; --config=configs/siglip2_b.py:ViT-L,512 selects another decoder and image size.
Requires --config.data.path and access to the model hub.
Training can start from the decoder that RAE released (requires the torch extra; ViT-XL at 256 pixels only):
--config.model.pretrained_decoder_path=nyu-visionx/RAE-collections/decoders/siglip2/base_p16_i256/ViTXL_n08/model.pt
"""

from vqrae_jax import config
from vqrae_jax.config import recipes


def get_config(decoder_and_size="ViT-XL,256"):
    decoder, pixels = config.parse_decoder_and_size(decoder_and_size)
    c = config.defaults()
    c.model.encoder_cls = "SigLIP2wNorm"
    c.model.encoder_config_path = f"google/siglip2-base-patch16-{pixels}"
    c.model.encoder_input_size = pixels
    c.model.decoder_config_path = decoder
    c.data.image_size = pixels
    recipes.half_precision(c)
    return c
