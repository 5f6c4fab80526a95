"""VFMTok: 256 tokens free of the grid, on DINOv2-L at 336 pixels, in a gradient codebook of 16,384 (arXiv:2507.08441).

Encoder, its layers, tokens, codebook, losses, their weights, rates, betas, clipping and epochs are those of the paper's
repository (CVMI-Lab/VFMTok2). Differences:

| | VFMTok | this config |
| --- | --- | --- |
| queries | deformable attention to each layer, 6 blocks | attention to the sum of mapped layers, 6 wider blocks |
| decoder | 6 blocks that predict the features, then convolutions | ViT-L, whose features two blocks predict |
| codebook before training | random directions | k-means on the first batch |
| batch, precision | 16 images in its script, float32 | 256 images, bfloat16 |

Requires --config.data.path, and the hub (or local paths) for the weights of the encoder, VGG16, the LPIPS heads and
DINO; reading .pth files requires the torch extra.
Hardware (estimate, not run at full size): 168 exaFLOP; 20 hours on 8 H100 at 30 % of the peak.
Preflight's lower bounds for them: 6.5 hours of arithmetic; 31 hours by the memory traffic of the program for CPUs.
The paper reports rFID 0.89 on ImageNet validation, resized to 256 pixels.
"""

from vqrae_jax import config
from vqrae_jax.config import recipes


def get_config():
    c = config.defaults()
    c.model.encoder_cls = "Dinov2withNorm"
    c.model.encoder_config_path = "facebook/dinov2-with-registers-large"
    c.model.encoder_params.layers = (5, 11, 17, -1)
    c.model.encoder_params.fusion = "linear"
    c.model.encoder_input_size = 336
    c.model.resampler_tokens = 256
    c.model.resampler_blocks = 6
    c.model.decoder_config_path = "ViT-L"
    c.model.decoder_patch_size = 14
    c.model.decoder_features = (-1,)
    c.model.decoder_feature_blocks = 2
    c.model.remat = True
    c.model.quantizer = "vq"
    c.model.num_embeddings = 16_384
    c.model.quantizer_params.codebook_dim = 12
    c.model.quantizer_params.distance = "cosine"
    recipes.half_precision(c)
    c.loss.pixel = "l2"
    c.loss.pixel_weight = 8.0  # twice the error in [-1, 1]
    c.loss.feature_weight = 1.0
    c.loss.perceptual.weight = 1.0
    c.adversary.discriminator = "dino"
    c.adversary.weight = 0.5
    c.adversary.adaptive = False
    c.adversary.generator_loss = "non_saturating"
    c.adversary.start_steps = c.adversary.generator_start_steps = 20_000
    c.data.image_size = 336
    c.data.batch_size = 256
    c.train.epochs = 50.0
    c.optimizer.warmup_epochs = 4.0
    for optimizer in (c.optimizer, c.adversary.optimizer):
        optimizer.learning_rate = 1e-4
        optimizer.schedule = "constant"
        optimizer.clip_norm = 1.0
    return c
