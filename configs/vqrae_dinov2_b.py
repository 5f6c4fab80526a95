"""VQRAE-DINOv2-B of the PyTorch VQRAE: 256 tokens per image, a codebook of 8,192, a ViT-XL decoder, 256 pixels.

Images, losses and schedule are those of RAE (`vqrae_jax.config.recipes.rae_stage1` lists the differences): L1, LPIPS
and an adaptive DINO adversary, 16 epochs of ImageNet in batches of 512. Unlike in the PyTorch VQRAE, the codebook
starts by k-means and dead codes are revived, and inference uses the EMA parameters with the live codebook.

Requires --config.data.path, and the hub (or local paths) for the weights of the encoder, VGG16, the LPIPS heads and
DINO; reading .pth files requires the torch extra.
Hardware (not run at full size): 24 exaFLOP; an estimated 3 hours on 8 H100 at 30 % of the peak. Compiled ahead of time
for 64 TPU v5e it takes 10.5 of 15.75 GiB per chip and at least 42 minutes (docs/preflight.md).
Target: rFID below 2 on ImageNet validation (README of RAE: 0.54 to 0.57 for the continuous RAE), at least half of the
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
