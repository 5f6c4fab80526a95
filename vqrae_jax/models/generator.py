"""The bidirectional transformer of MaskGIT (Chang et al. 2022, arXiv:2202.04200): indices in, logits of indices out."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vqrae_jax.models.layers import ACTIVATIONS
from vqrae_jax.models.vit import BlocksConfig, layer_norm, matmul_precision, run_blocks


class Generator(nn.Module):
    """Embedded indices and positions, a class token, pre-norm blocks, and a head tied to the embedding.

    Attributes:
      blocks: the transformer.
      num_embeddings: size K of the codebook.
      positions: number N of indices per image.
      classes: number of classes; 0: unconditional.
    """

    blocks: BlocksConfig
    num_embeddings: int
    positions: int
    classes: int = 0

    @nn.compact
    def __call__(self, indices: Int[Array, "B ..."], label: Int[Array, " B"] | None = None) -> Float[Array, "B N K"]:
        """Returns float32 logits of every index.

        Args:
          indices: in [0, K); K where one is hidden.
          label: in [0, classes); `classes` is the unconditional label, which None gives to all images. Train with
            about one image in ten unconditional for `generation.sampling.guided`.
        """
        c, size = self.blocks, self.num_embeddings
        if indices.shape[1:] != (self.positions,):
            raise ValueError(f"indices have shape {indices.shape}, expected [B, {self.positions}]: flatten the grids")
        normal = nn.initializers.normal(0.02)
        table = self.param("code_embed", normal, (size, c.width))
        hidden = self.param("hidden_embed", normal, (c.width,))
        x = jnp.where((indices < size)[..., None], table[jnp.minimum(indices, size - 1)], hidden)
        x = (x + self.param("pos_embed", normal, (1, self.positions, c.width))).astype(c.dtype)
        if self.classes:
            label = jnp.full(len(indices), self.classes) if label is None else label
            token = self.param("class_embed", normal, (self.classes + 1, c.width))[label]
            x = jnp.concatenate([token[:, None].astype(c.dtype), x], axis=1)
        x = layer_norm(c, "norm_embed")(x)
        x = layer_norm(c, "norm")(run_blocks(c, x)[0])[:, -self.positions :]
        dense = {"dtype": c.dtype, "precision": matmul_precision(c.dtype)}
        x = ACTIVATIONS[c.act](nn.Dense(c.width, **dense, name="head")(x))
        x = layer_norm(c, "norm_head")(x)
        bias = self.param("bias", nn.initializers.zeros, (size,))
        tied = table.astype(c.dtype).T
        return jnp.matmul(x, tied, precision=dense["precision"], preferred_element_type=jnp.float32) + bias
