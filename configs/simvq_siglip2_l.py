"""SimVQ on SigLIP 2-L by the two stages of the VQRAE paper (Du et al. 2025, arXiv:2511.23386, table 7, 256 pixels).

Stage 1, --config=configs/simvq_siglip2_l.py:1, trains the codebook and the decoder on the frozen encoder, without a
discriminator. Stage 2, --config=configs/simvq_siglip2_l.py:2 --config.train.start_from=WORKDIR_OF_STAGE_1
--workdir=NEW_WORKDIR, also trains the encoder, with distillation from its frozen copy, and has a discriminator in the
last 20,000 of its 70,000 steps. Size and width of the codebook, weights of the losses, rates, betas, weight decay,
clipping, warm-up, batch size and steps are those of the table. Differences:

| | paper | this config |
| --- | --- | --- |
| encoder | SigLIP 2-so400m | SigLIP 2-L |
| decoder | shape of the encoder: 27 blocks of width 1,152 | ViT-XL: 28 blocks of width 1,152 |
| perceptual network | ConvNeXt-S | LPIPS, which the paper's equation 2 names |
| discriminator | not described | PatchGAN, hinge loss, constant weight, as in the code of TiTok that the paper adapts |
| codebook before training | not described | k-means on the first batch |
| images | 36 million of BLIP3-o | those of data.path |

Requires --config.data.path, and the hub (or local paths) for the weights of the encoder, VGG16 and the LPIPS heads;
reading .pth files requires the torch extra.
Hardware (estimate, not run at full size): 116 and 118 exaFLOP; 14 hours per stage on 8 H100 at 30 % of the peak.
The paper reports 22.2 dB PSNR and rFID 1.31 on ImageNet validation, and all of the codebook in use.
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
    c.model.remat = True
    c.model.quantizer = "simvq"
    c.model.num_embeddings = 16_384
    c.model.quantizer_params.codebook_dim = 1536
    c.model.quantizer_params.distance = "l2"
    recipes.half_precision(c)
    c.loss.pixel = "l2"
    c.loss.perceptual.weight = 1.1
    c.data.batch_size = 1024
    for optimizer in (c.optimizer, c.adversary.optimizer):
        optimizer.b2 = 0.999
        optimizer.weight_decay = 1e-4
        optimizer.clip_norm = 1.0
        optimizer.warmup_steps = 2_000
    if stage == "1":
        c.train.steps = 100_000
        c.optimizer.learning_rate, c.optimizer.final_learning_rate = 4e-4, 1e-4
    else:
        c.train.steps = 70_000
        c.train.trainable = ("encoder", "quantizer", "decoder")
        c.optimizer.learning_rate, c.optimizer.final_learning_rate = 1e-4, 1e-5
        c.optimizer.encoder_rate = 0.1
        c.optimizer.constant = ("encoder",)  # both of its rates in the table are 1e-5
        c.loss.distill_weight = 1.0
        c.adversary.discriminator = "patch"
        c.adversary.weight = 0.1
        c.adversary.adaptive = False
        c.adversary.augment = 0.0
        c.adversary.start_steps = c.adversary.generator_start_steps = 50_000
        c.adversary.optimizer.learning_rate, c.adversary.optimizer.final_learning_rate = 4e-5, 1e-5
    return c
