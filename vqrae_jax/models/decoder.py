"""Latent grid to pixels: the ViT decoder of RAE (Zheng et al. 2025, arXiv:2510.11690), which is the decoder of MAE."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vqrae_jax.models.vit import BlocksConfig, layer_norm, matmul_precision, run_blocks, unpatchify
from vqrae_jax.resize import resize

# width, depth, heads, mlp
SIZES = {
    "vit_mae-base": (512, 8, 16, 2048),
    "ViT-Nano": (128, 2, 4, 384),  # for a laptop, see configs/quickstart.py
    "ViT-Tiny": (192, 6, 3, 768),
    "ViT-S": (384, 12, 6, 1536),
    "ViT-B": (768, 12, 12, 3072),
    "ViT-L": (1024, 24, 16, 4096),
    "ViT-XL": (1152, 28, 16, 4096),
}


def sincos_table(grid: int, width: int, extent: int | None = None) -> Float[np.ndarray, "1 n D"]:
    """Returns fixed 2-D sine-cosine positions, n = 1 + grid^2: zeros for cls first, then the grid by rows.

    The first half of the channels encodes the column. Positions are steps of extent / grid; None: of 1.
    """
    frequency = 1.0 / 10000 ** (np.arange(width // 4) / (width / 4))
    positions = np.arange(grid) * ((extent or grid) / grid)
    row, column = np.meshgrid(positions, positions, indexing="ij")
    angles = [axis.reshape(-1, 1) * frequency for axis in (column, row)]
    table = np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1)
    return np.concatenate([np.zeros((1, width)), table])[None].astype(np.float32)


class Decoder(nn.Module):
    """Linear embedding, cls token, positions, pre-norm blocks, final norm, linear projection to pixels.

    Attributes:
      blocks: the transformer.
      grid: side of the native latent grid; images are always grid * patch pixels wide.
      patch: side in pixels of the patch that a latent becomes.
      mean, std: per channel; the network predicts pixels normalized like the encoder's input.
      train_pos_embed: trains the position table, as the PyTorch VQRAE does.
      features: channels of a linear head that predicts encoder features from the last tokens; 0 omits the head.
    """

    blocks: BlocksConfig
    grid: int
    patch: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    train_pos_embed: bool = False
    features: int = 0

    @property
    def image_size(self) -> int:
        """Side of the decoded images in pixels."""
        return self.grid * self.patch

    @nn.compact
    def __call__(
        self, latent: Float[Array, "B h w C"], with_features: bool = False
    ) -> Float[Array, "B H W 3"] | tuple[Float[Array, "B H W 3"], Float[Array, "B g g F"] | None]:
        """Decodes latents; those of another grid are resampled bilinearly.

        Returns:
          Float32 images, in [0, 1] but not clipped. With `with_features` also the predicted encoder features, None
          without that head.
        """
        c, n = self.blocks, self.grid
        dense = {"dtype": c.dtype, "precision": matmul_precision(c.dtype)}
        x = nn.Dense(c.width, **dense, name="embed")(latent)
        x = resize(x, n, n, "bilinear").reshape(len(x), n * n, c.width)
        cls = self.param("cls", nn.initializers.normal(0.02), (1, 1, c.width))
        pos = self.param("pos_embed", lambda _: jnp.asarray(sincos_table(n, c.width)))
        if not self.train_pos_embed:
            pos = jax.lax.stop_gradient(pos)
        x = jnp.concatenate([jnp.broadcast_to(cls, (len(x), 1, c.width)).astype(x.dtype), x], axis=1)
        x, _ = run_blocks(c, x + pos.astype(x.dtype))
        x = layer_norm(c, "norm")(x)[:, 1:]
        pixels = c.shard(nn.Dense(self.patch**2 * 3, **dense, name="pred")(x).astype(jnp.float32))
        image = unpatchify(pixels.reshape(len(x), n, n, -1), self.patch)
        image = image * jnp.asarray(self.std) + jnp.asarray(self.mean)
        if not with_features:
            return image
        if not self.features:
            return image, None
        return image, nn.Dense(self.features, **dense, name="features")(x).reshape(len(x), n, n, -1)
