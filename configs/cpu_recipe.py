"""The full recipe on two CPU cores: tiny networks, 64 pixels, 8 x 8 tokens, nothing downloaded.

It has the parts of configs/recipe_16k.py with smaller networks and settings of its own: low-dimensional codes (four
residual levels of 512; one level of 64 tokens encodes little more than colors), k-means start, revival, feature
reconstruction and an adaptive adversary. A feature loss in the tokens of a small ViT replaces LPIPS, and a PatchGAN
replaces the DINO discriminator.

The encoder and the ViT of the feature loss start from random weights. --config=configs/cpu_recipe.py:/path/to/vit, a
local DINOv2-like hub folder with 16-pixel patches, loads both; the feature loss is useful only with trained weights.

Hardware: two CPU cores, about 10 minutes for 400 steps (estimate). Target: 20 dB PSNR on held-out photographs, and a
smaller feature distance than without the feature loss.
"""

from vqrae_jax import config

RANDOM = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 16, "image_size": 224}


def get_config(encoder=""):
    c = config.defaults()
    side = 64
    c.model.encoder_config_path = c.loss.perceptual.path = encoder or None
    if not encoder:
        c.model.encoder_params.architecture = dict(RANDOM)
        c.loss.perceptual.architecture = dict(RANDOM)
    c.model.encoder_input_size = side * 2  # 8 x 8 tokens
    c.model.encoder_params.layers = (0, -1)
    c.model.decoder_config_path = "ViT-Tiny"
    c.model.decoder_patch_size = 8
    c.model.decoder_features = (-1,)
    c.model.quantizer = "residual"
    c.model.num_embeddings = 512
    c.model.quantizer_params.depth = 4
    c.model.quantizer_params.codebook_dim = 32
    c.model.commitment_cost = 0.02  # at 0.25 the projections shrink, and images stay near mean colors
    c.model.vq_decay = 0.95  # the codebook must follow the projections, which train

    c.data.source = "photographs"
    c.data.image_size = side
    c.data.scale = (1.5, 7.0)
    c.data.batch_size = 16
    c.data.eval_batch_size = 50

    c.loss.feature_weight = 0.1
    c.loss.perceptual.network = "encoder"
    c.loss.perceptual.weight = 0.2
    c.loss.perceptual.layers = (0, 2, 4, 6) if encoder else (0, -1)
    c.loss.perceptual.input_size = side * 2
    c.adversary.discriminator = "patch"
    c.adversary.width = 32
    c.adversary.layers = 2
    c.adversary.weight = 0.3
    c.adversary.lecam_weight = 0.001
    # The adversary starts at step 0: a later start compiles a conditional, in which XLA's CPU compiler makes
    # convolutions over ten times slower.
    c.adversary.optimizer.learning_rate = 4e-4

    c.optimizer.learning_rate = 1e-3
    c.optimizer.final_learning_rate = 1e-5
    c.optimizer.warmup_steps = 50
    c.optimizer.clip_norm = 1.0
    c.optimizer.ema_decay = 0.99
    c.optimizer.constant = ("quantizer",)

    c.train.steps = 400
    c.train.log_every = 25
    c.train.evaluate_every = 200
    c.train.checkpoint_every = 200
    return c
