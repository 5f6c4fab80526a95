"""SimVQ with 16,384 codes on SigLIP 2-L in the two stages of the VQRAE paper: 100,000 and 70,000 steps.

Stage 1, --config=configs/simvq_siglip2_l.py:1, trains the codebook and the decoder on the frozen encoder. Stage 2,
--config=configs/simvq_siglip2_l.py:2 --config.train.start_from=WORKDIR_OF_STAGE_1 --workdir=NEW_WORKDIR, also trains
the encoder at a twentieth of the learning rate, with distillation from its frozen copy.

Requires --config.data.path, and the hub (or local paths) for the weights of the encoder, VGG16, the LPIPS heads and
DINO; reading .pth files requires the torch extra.
Hardware (estimate, not run at full size): 75 exaFLOP per stage; 11 hours on 32 TPU v5e or 9 hours on 8 H100 at 30 % of
the peak. Target: 22 dB PSNR, rFID below 1.5 on ImageNet validation, nearly the whole codebook in use.
"""

from vqrae_jax import config
from vqrae_jax.config import recipes
from vqrae_jax.errors import ConfigError


def get_config(stage="1"):
    if stage not in ("1", "2"):
        raise ConfigError("must be 1 or 2, for example configs/simvq_siglip2_l.py:2", field="--config", value=stage)
    c = config.defaults()
    c.model.encoder_cls = "SigLIP2wNorm"
    c.model.encoder_config_path = "google/siglip2-large-patch16-256"
    c.model.encoder_input_size = 256
    c.model.decoder_config_path = "ViT-XL"
    c.model.decoder_features = (-1,)
    c.model.remat = True
    c.model.quantizer = "simvq"
    c.model.num_embeddings = 16_384
    c.loss.feature_weight = 0.5
    recipes.rae_stage1(c)
    recipes.half_precision(c)
    c.train.epochs = None
    c.optimizer.clip_norm = 1.0
    c.optimizer.warmup_epochs = c.adversary.optimizer.warmup_epochs = None
    c.adversary.start_epochs = c.adversary.generator_start_epochs = None
    c.optimizer.warmup_steps = c.adversary.optimizer.warmup_steps = 5_000
    if stage == "1":
        c.train.steps = 100_000
        c.adversary.start_steps, c.adversary.generator_start_steps = 40_000, 50_000
    else:
        c.train.steps = 70_000
        c.train.trainable = ("encoder", "quantizer", "decoder")
        c.optimizer.learning_rate, c.optimizer.final_learning_rate = 1e-4, 1e-5
        c.optimizer.encoder_rate = 0.05
        c.loss.distill_weight = 1.0
        c.adversary.generator_start_steps = 2_000  # the discriminator starts from its initial weights
    return c
