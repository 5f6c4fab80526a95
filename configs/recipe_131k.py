"""256 tokens per image of 131,072 codes (17 bits), otherwise configs/recipe_16k.py.

The size of the codebook and its search are those of dRAE (arXiv:2607.22148): nearest by angle, while embeddings keep
the length of their latents. dRAE learns directions by gradients. Here k-means starts the codebook of 32 projected
channels, and running means of the latents fit directions and lengths.

Requires --config.data.path, and the hub (or local paths) for the weights of the encoder, VGG16, the LPIPS heads and
DINO; reading .pth files requires the torch extra.
Hardware (estimate, not run at full size): 83 exaFLOP; 10 hours on 8 H100 at 30 % of the peak.
Preflight's lower bounds for them: 3.0 hours of arithmetic; 17 hours by the memory traffic of the program for CPUs.
Target: rFID of at most 0.6 on ImageNet validation, 23 dB PSNR, at least 95 % of the codebook in use; dRAE reports rFID
0.42, 24.5 dB and all of it.
"""

from vqrae_jax import config
from vqrae_jax.config import recipes


def get_config():
    c = config.defaults()
    recipes.discrete_rae(c, epochs=50.0)
    c.model.num_embeddings = 131_072
    c.model.quantizer_params.codebook_dim = 32
    c.model.quantizer_params.distance = "angle"
    return c
