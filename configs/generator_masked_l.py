"""A masked generator of ImageNet at 256 pixels: 24 blocks x 1024 on 16 x 16 codes of 16,384.

Data as in configs/generator_masked_b.py. The network is that of Halton-MaskGIT-Large (480 M parameters), which is
published for 384 pixels.
Hardware (estimate, not run at full size): 207 exaFLOP; 24 hours on 8 H100 at 30 % of the peak.
Target: gFID below that of configs/generator_masked_b.py.
"""

from vqrae_jax import config
from vqrae_jax.config import recipes


def get_config():
    c = config.defaults()
    recipes.masked_generator(c, width=1024, depth=24, heads=16, mlp=2816)
    return c
