"""The recommended recipe for ImageNet: 256 tokens per image, a codebook of 16,384, a ViT-XL decoder, 256 pixels.

Networks, losses and schedule are `recipes.discrete_rae`, which names the paper of each part, for 50 epochs as VFMTok
(RAE: 16). Latents are projected to 32 channels and quantized by cosine distance (ViT-VQGAN, Yu et al. 2021,
arXiv:2110.04627). Running means learn the codebook (van den Oord et al. 2017, arXiv:1711.00937), with k-means start and
revival of our own.

Requires --config.data.path, and the hub (or local paths) for the weights of the encoder, VGG16, the LPIPS heads and
DINO; reading .pth files requires the torch extra.
Hardware (estimate, not run at full size): 83 exaFLOP; 10 hours on 8 H100 at 30 % of the peak.
Preflight's lower bounds for them: 3.0 hours of arithmetic; 16 hours by the memory traffic of the program for CPUs.
Target: rFID of 0.7 to 0.9 on ImageNet validation, 21 dB PSNR, more than 90 % of the codebook in use. VFMTok
(arXiv:2507.08441), a tokenizer on DINOv2 with as many codes, has 0.89.
"""

from vqrae_jax import config
from vqrae_jax.config import recipes


def get_config():
    c = config.defaults()
    recipes.discrete_rae(c, epochs=50.0)
    c.model.num_embeddings = 16_384
    c.model.quantizer_params.codebook_dim = 32
    c.model.quantizer_params.distance = "cosine"
    return c
