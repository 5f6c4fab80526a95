"""A masked generator of large codebooks by digits, as MaskBit: 24 blocks x 1024 on 16 x 16 codes of 2^18.

The head predicts two digits of 512 values independently, so that 2^18 codes need 1,024 columns in place of 262,144.
Binary codes (`model.quantizer` lfq or bsq) have digits with a meaning: groups of 9 signs.

Data as in configs/generator_masked_b.py, of a tokenizer with 2^18 codes: configs/recipe_bits.py with
--config.model.quantizer=bsq, --config.model.num_embeddings=262144 and --config.model.quantizer_params.codebook_dim=18.
For its own codes, two groups of 2^16, set --config.generator.levels=2, --config.generator.num_embeddings=65536 and
--config.generator.factors="(256, 256)" here. Network, masks, smoothing, optimizer, 1.35 M steps of 1,024 images and
sampler are those of MaskBit's repository (arXiv:2409.16211) for 14 bits, except for norms in front of attention and
MLP; MaskBit hides the digits of a code independently of each other, here they are hidden together.
Hardware (estimate, not run at full size): 684 exaFLOP; 80 hours on 8 H100 at 30 % of the peak.
Target: the gFID of 1.62 (50,000 samples, 64 steps) of MaskBit with 305 M parameters and 14 bits; with 18 bits it has
1.67.
"""

from vqrae_jax import config
from vqrae_jax.config import recipes


def get_config():
    c = config.defaults()
    recipes.imagenet_generator(c, 2**18)
    c.generator.factors = (512, 512)
    c.generator.width, c.generator.depth, c.generator.heads, c.generator.mlp = 1024, 24, 16, 4096
    c.generator.schedule = "arccos"
    c.generator.smoothing = 0.1
    c.generator.sampler.method = "confidence"
    c.generator.sampler.steps = 64
    c.generator.sampler.schedule = "arccos"
    c.generator.sampler.choice_temperature = 7.8
    c.generator.sampler.guidance = 7.1
    c.generator.sampler.guidance_schedule = "power-cosine"
    c.generator.sampler.guidance_power = 3.0
    c.train.steps = 1_350_000
    c.data.batch_size = 1024
    c.optimizer.learning_rate = 1e-4
    c.optimizer.final_learning_rate = 1e-5
    c.optimizer.warmup_steps = 5000
    c.optimizer.weight_decay = 0.045
    c.optimizer.b2 = 0.96
    return c
