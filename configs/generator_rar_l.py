"""RAR-L, an autoregressive generator with random orders, on 16 x 16 codes of 16,384: 24 blocks x 1024.

Data as in configs/generator_masked_b.py, with `vqrae tokenize --views=flip`.
Hardware (estimate, not run at full size): 271 exaFLOP; 32 hours on 8 H100 at 30 % of the peak; RAR used 32 GPUs.
Target: the gFID of 1.70 (50,000 samples) of RAR-L with 461 M parameters, on MaskGIT's tokenizer of 1,024 codes. The
guidance is RAR's for that tokenizer, in this notation (w = scale - 1); tune it for another.
"""

from vqrae_jax import config
from vqrae_jax.config import recipes


def get_config():
    c = config.defaults()
    recipes.rar_generator(c, width=1024, mlp=4096)
    c.generator.sampler.guidance = 14.5
    c.generator.sampler.guidance_power = 2.5
    c.generator.sampler.temperature = 1.02
    return c
