"""A masked generator of ImageNet at 256 pixels: 12 blocks x 768 on 16 x 16 codes of 16,384.

Data: codes of a tokenizer such as that of configs/recipe_16k.py, from `vqrae tokenize --views=ten-crop`, in
--config.data.path and --config.data.eval_path; --config.generator.tokenizer for pictures and evaluation.
Hardware (estimate, not run at full size): 64 exaFLOP; 7.5 hours on 8 H100 at 30 % of the peak.
Target: below the gFID of 4.17 (50,000 samples, guidance tuned) of Halton-MaskGIT with 142 M parameters, whose network
this is; the tokenizer bounds it from below.
"""

from vqrae_jax import config
from vqrae_jax.config import recipes


def get_config():
    c = config.defaults()
    recipes.masked_generator(c, width=768, depth=12, heads=12, mlp=2048)
    return c
