"""A class-conditional generator of a few hundred to thousands of small images, 16 x 16 codes: two CPU cores, an hour.

Autoregressive, because it learns more per step than masked diffusion; --config=configs/generator_cpu.py:masked selects
the latter. With more epochs, dropout or fewer steps prevent that it memorizes the images.

Requires --config.data.path and --config.data.eval_path, codes of configs/emoji_cpu.py or a similar tokenizer with 64 to
256 codes per image, and --config.generator.tokenizer. Measured on 1,752 emoji: see docs/generate.md.
"""

from vqrae_jax import config


def get_config(family="autoregressive"):
    c = config.defaults()
    c.train.task = "generator"
    c.generator.family = family
    c.generator.width = 128
    c.generator.depth = 6
    c.generator.heads = 4
    c.generator.mlp = 512
    c.generator.pos = "rope"
    c.generator.adaln = True
    c.generator.dropout = 0.0
    # Masked diffusion only: the bound of the likelihood with limited weights, and the order of the codes.
    c.generator.schedule = "linear"
    c.generator.loss = "bound"
    c.generator.max_snr = 5.0
    c.generator.sampler.method = "halton"
    c.generator.sampler.steps = 64
    c.generator.sampler.schedule = "arccos"
    c.generator.sampler.temperature = 0.9

    c.data.source = "codes"
    c.data.batch_size = 16
    c.data.eval_batch_size = 40

    c.optimizer.method = "muon"
    c.optimizer.learning_rate = 4e-3
    c.optimizer.final_learning_rate = 1e-5
    c.optimizer.warmup_steps = 50
    c.optimizer.weight_decay = 0.05
    c.optimizer.clip_norm = 1.0
    c.optimizer.ema_decay = 0.99

    c.train.steps = 1200
    c.train.log_every = 25
    c.train.evaluate_every = 200
    c.train.checkpoint_every = 200
    c.train.codebook_alarm = 0.0
    c.train.log_images = 36
    return c
