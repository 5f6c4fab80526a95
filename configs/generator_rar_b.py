"""RAR-B, an autoregressive generator with random orders, on 16 x 16 codes of 16,384: 24 blocks x 768.

Data as in configs/generator_masked_b.py, with `vqrae tokenize --views=flip`.
Hardware (estimate, not run at full size): 158 exaFLOP; 19 hours on 8 H100 at 30 % of the peak; RAR used 32 GPUs.
Target: the gFID of 1.95 (50,000 samples) of RAR-B with 261 M parameters, on MaskGIT's tokenizer of 1,024 codes. The
guidance is RAR's for that tokenizer, in this notation (w = scale - 1); tune it for another.
"""

from vqrae_jax import config
from vqrae_jax.config import recipes


def get_config():
    c = config.defaults()
    recipes.rar_generator(c, width=768, mlp=3072)
    c.generator.sampler.guidance = 15.0
    c.generator.sampler.guidance_power = 2.75
    return c
