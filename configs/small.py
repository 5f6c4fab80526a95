"""The full recipe for one GPU and one day: DINOv2-S, a ViT-S decoder, 256 tokens per image, 256 pixels.

--config=configs/small.py:simvq and :fsq select another quantizer than the default, ema. Images and weights of the
losses are those of RAE, with feature reconstruction and gradient clipping; the schedule is shorter, in batches of 64.

Requires --config.data.path, and the hub (or local paths) for the weights of the encoder, VGG16, the LPIPS heads and
DINO; reading .pth files requires the torch extra.
Hardware (estimate, not run): 3.6 exaFLOP for 150,000 steps of 64 images; 11 hours on one A100 or 4 hours on one H100 at
30 % of the peak. Target: 20 dB PSNR and more than 80 % of the codebook in use on held-out images.
"""

from vqrae_jax import config
from vqrae_jax.config import recipes
from vqrae_jax.errors import ConfigError

QUANTIZERS = ("ema", "simvq", "fsq")


def get_config(quantizer="ema"):
    if quantizer not in QUANTIZERS:
        raise ConfigError(f"must be one of {', '.join(QUANTIZERS)}", field="--config", value=quantizer)
    c = config.defaults()
    c.model.encoder_cls = "Dinov2withNorm"
    c.model.encoder_config_path = "facebook/dinov2-with-registers-small"
    c.model.decoder_config_path = "ViT-S"
    c.model.decoder_features = (-1,)
    c.model.quantizer = quantizer
    if quantizer == "fsq":
        c.model.quantizer_params.levels = (8, 8, 5, 5)  # 1,600 indices
    if quantizer == "ema":
        c.model.quantizer_params.codebook_dim = 32
        c.model.quantizer_params.distance = "cosine"
    c.loss.feature_weight = 0.5
    recipes.rae_stage1(c)
    recipes.half_precision(c)
    c.train.epochs = None
    c.train.steps = 150_000
    c.data.batch_size = c.data.eval_batch_size = 64
    c.optimizer.clip_norm = 1.0
    c.optimizer.warmup_epochs = c.adversary.optimizer.warmup_epochs = None
    c.adversary.start_epochs = c.adversary.generator_start_epochs = c.adversary.optimizer.decay_end_epochs = None
    c.optimizer.warmup_steps = c.adversary.optimizer.warmup_steps = 2_000
    c.adversary.start_steps, c.adversary.generator_start_steps = 50_000, 60_000
    return c
