"""VQBridge: a transformer over the codebook (Chang et al. 2025, arXiv:2509.10140)."""

import functools

import flax.linen as nn
import jax

from vqrae_jax.quantizers.arrays import Codebook

WIDTH, BLOCKS, HEADS, MLP_RATIO = 256, 2, 4, 2  # of the authors' models of 16,384 to 262,144 embeddings


class VQBridge(nn.Module):
    """Maps a codebook by a ViT whose tokens are groups of G embeddings, so that one gradient moves all of them.

    A linear map compresses the G * C channels of a group to one token, blocks process the K / G tokens together, and a
    linear map recovers G embeddings from each. In the paper a group is a square patch of embeddings on a square; here,
    where their order has no meaning either, it is G consecutive ones. The result, which starts at zero, is added to the
    codebook, so that it starts from latents; in the paper it replaces the codebook. Attention has no biases.
    """

    group: int  # G

    @nn.compact
    def __call__(self, codebook: Codebook) -> Codebook:
        precise = {"precision": jax.lax.Precision.HIGHEST, "kernel_init": nn.initializers.xavier_uniform()}
        norm = functools.partial(nn.LayerNorm, epsilon=1e-6, use_bias=False, use_scale=False)
        groups = codebook.reshape(-1, self.group * codebook.shape[1])
        x = nn.Dense(WIDTH, **precise, name="compress")(groups)
        for i in range(BLOCKS):
            x += nn.MultiHeadDotProductAttention(HEADS, use_bias=False, **precise, name=f"attention_{i}")(norm()(x))
            hidden = nn.gelu(nn.Dense(MLP_RATIO * WIDTH, **precise, name=f"up_{i}")(norm()(x)))
            x += nn.Dense(WIDTH, **precise, name=f"down_{i}")(hidden)
        precise["kernel_init"] = nn.initializers.zeros
        return codebook + nn.Dense(groups.shape[1], **precise, name="recover")(norm()(x)).reshape(codebook.shape)
