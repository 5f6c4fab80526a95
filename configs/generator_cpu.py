"""A class-conditional generator of 16 x 16 codes, for two CPU cores."""

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
    c.generator.schedule = "linear"
    c.generator.loss = "bound"
    c.generator.max_snr = 5.0
    c.generator.sampler.method = "halton"
    c.generator.sampler.steps = 64
    c.generator.sampler.schedule = "arccos"
    c.generator.sampler.guidance = 1.0
    c.generator.sampler.guidance_schedule = "linear"

    c.data.source = "codes"
    c.data.batch_size = 16
    c.data.eval_batch_size = 53

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
