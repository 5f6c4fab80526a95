"""FSQ on DINOv2-B with registers: 8 x 8 x 8 x 6 x 5 = 15,360 indices without a learned codebook.

The latents are whitened first, because their common mean would hold every channel at one level. Images, losses and
schedule are those of RAE (`vqrae_jax.config.recipes.rae_stage1`); unlike there, gradients are clipped.

Requires --config.data.path, and the hub (or local paths) for the weights of the encoder, VGG16, the LPIPS heads and
DINO; reading .pth files requires the torch extra.
Hardware (estimate, not run at full size): 24 exaFLOP; 3 hours on 8 H100 at 30 % of the peak.
Target: rFID below 2 on ImageNet validation.
"""

from vqrae_jax import config
from vqrae_jax.config import recipes


def get_config():
    c = config.defaults()
    c.model.encoder_cls = "Dinov2withNorm"
    c.model.encoder_config_path = "facebook/dinov2-with-registers-base"
    c.model.decoder_config_path = "ViT-XL"
    c.model.remat = True
    c.model.quantizer = "fsq"
    c.model.quantizer_params.levels = (8, 8, 8, 6, 5)
    c.model.quantizer_params.adapter = "linear"
    c.model.quantizer_params.whitening_dim = 64
    recipes.rae_stage1(c)
    recipes.half_precision(c)
    c.optimizer.clip_norm = 1.0
    return c
