"""VQRAE-DINOv2-B of the PyTorch VQRAE: 256 tokens per image, a codebook of 8,192, a ViT-XL decoder, 256 pixels.

Losses and schedule are those of RAE: L1, LPIPS and an adaptive DINO adversary, 16 epochs of ImageNet in batches of 512.
The codebook starts by k-means and does not collapse, and inference uses the EMA parameters with the live codebook.

Requires --config.data.path, and the hub (or local paths) for the weights of the encoder, VGG16, the LPIPS heads and
DINO; reading .pth files requires the torch extra.
Hardware (estimate, not run at full size): 24 exaFLOP; 7 hours on 16 TPU v5e or 3 hours on 8 H100 at 30 % of the peak.
Target: rFID below 2 on ImageNet validation (the continuous RAE of this size reaches 0.5 to 0.6), at least half of the
codebook in use.
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
