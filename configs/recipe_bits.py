"""256 tokens of 32 bits each: two groups of 16 signs per token, otherwise configs/recipe_16k.py.

Binary spherical quantization (arXiv:2406.07548) has neither a codebook nor a search. 32 bits per token, of one linear
map of the latent, are those of BAR (arXiv:2602.09024); two groups of 65,536 codes are two indices per token, which
data, generators and exports accept. Each group is on a unit sphere of its own.

Requires --config.data.path, and the hub (or local paths) for the weights of the encoder, VGG16, the LPIPS heads and
DINO; reading .pth files requires the torch extra.
Hardware (estimate, not run at full size): 83 exaFLOP; 10 hours on 8 H100 at 30 % of the peak.
Preflight's lower bounds for them: 3.0 hours of arithmetic; 16 hours by the memory traffic of the program for CPUs.
Target: rFID of at most 0.6 on ImageNet validation; BAR reports 0.33.
"""

from vqrae_jax import config
from vqrae_jax.config import recipes


def get_config():
    c = config.defaults()
    recipes.discrete_rae(c, epochs=50.0)
    c.model.quantizer = "product"
    c.model.quantizer_params.inner = "bsq"
    c.model.quantizer_params.groups = 2
    c.model.num_embeddings = 2**16
    c.model.quantizer_params.codebook_dim = 32
    return c
