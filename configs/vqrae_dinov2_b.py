"""The PyTorch origin's VQRAE-DINOv2-B with the ViT-XL decoder, as it was meant to run: 256 codes of 8,192, 256 pixels.

Its losses and schedule are those of RAE: L1 + LPIPS + adaptive DINO adversary, 16 epochs of ImageNet in batches of 512.
What its code does otherwise (a codebook that collapses, EMA without it) is not repeated here.

Needs --config.data.path and a network for the encoder, VGG16, the LPIPS heads and DINO (or local paths; .pth files need
the torch extra). Estimate, no run of full size has been done yet: 24 exaFLOP by count; at 30 % of the peak 7 hours on
16 TPU v5e or 3 on 8 H100, if the input keeps up. Aims at an rFID below 2 on ImageNet's validation images (the
continuous RAE of this size: 0.5 to 0.6) and more than half of the codes in use.
"""

from vqrae_jax import config
from vqrae_jax.config import recipes


def get_config():
    c = config.defaults()
    c.model.encoder_cls = "Dinov2withNorm"
    c.model.encoder_config_path = "facebook/dinov2-with-registers-base"
    c.model.encoder_input_size = 224
    c.model.decoder_config_path = "ViT-XL"
    c.model.num_embeddings = 8192
    recipes.rae_stage1(c)
    recipes.half_precision(c)
    c.model.remat = True
    return c
