"""Our best recipe for 256 tokens of 16,384 codes at 256 pixels, put together from the field's ablations.

Frozen DINOv2-B with registers, the mean of a shallow, a middle and the last layer (detail beside meaning); learned
projections to 32 channels with cosine codes, k-means start and revival; the decoder also has to tell the encoder's
middle and last layer (cosine), which keeps meaning in the codes; LPIPS and the adaptive DINO adversary.

Needs --config.data.path and a network for the encoder, VGG16, the LPIPS heads and DINO (or local paths; .pth files need
the torch extra). Estimate, no run of full size has been done yet: 25 exaFLOP by count; at 30 % of the peak 7 hours on
16 TPU v5e or 3 on 8 H100, if the input keeps up. Aims at an rFID below 1.5 on ImageNet's validation images, 21 dB PSNR,
and more than 90 % of the codes in use.
"""

from vqrae_jax import config
from vqrae_jax.config import recipes


def get_config():
    c = config.defaults()
    c.model.encoder_cls = "Dinov2withNorm"
    c.model.encoder_config_path = "facebook/dinov2-with-registers-base"
    c.model.encoder_params.layers = (2, 6, -1)
    c.model.encoder_input_size = 224
    c.model.decoder_config_path = "ViT-XL"
    c.model.decoder_features = (6, -1)
    c.model.remat = True
    c.model.num_embeddings = 16_384
    c.model.quantizer_params.codebook_dim = 32
    c.model.quantizer_params.distance = "cosine"
    c.loss.feature_weight = 0.5
    recipes.rae_stage1(c)
    recipes.half_precision(c)
    c.optimizer.constant = ("quantizer",)
    c.optimizer.clip_norm = 1.0
    c.adversary.lecam_weight = 0.001
    c.data.crop = "adm"
    return c
