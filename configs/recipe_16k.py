"""The recommended recipe for ImageNet: 256 tokens per image, a codebook of 16,384, a ViT-XL decoder, 256 pixels.

The latent is the mean of a shallow, a middle and the last layer of a frozen DINOv2-B with registers. It is projected to
32 channels and quantized by cosine distance, with k-means start and revival. The decoder also predicts the encoder's
middle and last layer. Losses: L1, LPIPS, feature reconstruction and an adaptive DINO adversary. Their weights and the
schedule are those of RAE; crops, flips, clipping, LeCam and the constant rate of the quantizer are not.

Requires --config.data.path, and the hub (or local paths) for the weights of the encoder, VGG16, the LPIPS heads and
DINO; reading .pth files requires the torch extra.
Hardware (estimate, not run at full size): 25 exaFLOP; 3 hours on 8 H100 at 30 % of the peak.
Target: rFID below 1.5 on ImageNet validation, 21 dB PSNR, more than 90 % of the codebook in use.
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
    c.data.crop, c.data.resize, c.data.flip = "adm", 1.0, True
    return c
