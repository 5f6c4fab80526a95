"""VQRAE on MAE-B.

Decoder and picture size: --config=configs/mae_b.py:ViT-L,512 (else ViT-XL,256).
It converges faster from the decoder that RAE released (needs the torch extra, ViT-XL at 256 only):
--config.model.pretrained_decoder_path=nyu-visionx/RAE-collections/decoders/mae/base_p16/ViTXL_n08/model.pt
"""

from vqrae_jax import config


def get_config(parse_decoder_and_size="ViT-XL,256"):
    decoder, pixels = config.parse_decoder_and_size(parse_decoder_and_size)
    c = config.defaults()
    c.model.encoder_cls = "MAEwNorm"
    c.model.encoder_config_path = "facebook/vit-mae-base"
    c.model.encoder_input_size = pixels
    c.model.decoder_config_path = decoder
    c.data.image_size = pixels
    return c
