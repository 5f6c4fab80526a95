"""A tokenizer of small drawings on a plain background, 64 x 64 pixels as 16 x 16 codes of 512: two CPU cores, minutes.

A random encoder of one block, nearly linear, stays frozen, so that a code describes its own 4 x 4 pixels and their
surroundings little. Training is for codes of configs/generator_cpu.py; few codes make that task easier. Dead codes are
not revived: most of them would move to the background, of which one code is enough.

Requires --config.data.path, a folder with a subfolder per class. Measured on 1,752 emoji: see docs/generate.md.
"""

from vqrae_jax import config


def get_config():
    c = config.defaults()
    c.model.encoder_config_path = None
    c.model.encoder_params.architecture = {
        "hidden_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "patch_size": 4,
        "image_size": 64,
    }
    c.model.encoder_input_size = 64
    c.model.decoder_config_path = "ViT-Nano"
    c.model.decoder_patch_size = 4
    c.model.decoder_head = "overlap"
    c.model.num_embeddings = 512
    c.model.vq_decay = 0.995
    c.model.revival_threshold = 0.0  # half of the revived codes would share the plain background

    c.data.image_size = 64
    c.data.batch_size = 16
    c.data.eval_batch_size = 64

    c.loss.gradient_weight = 1.0
    c.optimizer.method = "muon"
    c.optimizer.learning_rate = 4e-3
    c.optimizer.final_learning_rate = 1e-5
    c.optimizer.warmup_steps = 50
    c.optimizer.clip_norm = 1.0
    c.optimizer.ema_decay = 0.99

    c.train.steps = 800
    c.train.log_every = 25
    c.train.evaluate_every = 200
    c.train.checkpoint_every = 200
    c.train.log_images = 32
    return c
