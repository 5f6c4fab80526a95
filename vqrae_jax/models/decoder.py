"""Latent grid to pixels: the ViT decoder of RAE (Zheng et al. 2025, arXiv:2510.11690), which is the decoder of MAE."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from vqrae_jax.models.resampler import Canvas
from vqrae_jax.models.vit import (
    BlocksConfig,
    Tokens,
    ViTConfig,
    layer_norm,
    matmul_precision,
    resample_positions,
    run_blocks,
    unpatchify,
)
from vqrae_jax.resize import resize

REGISTERS = 4  # of `FeatureDecoder`

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


def overlap_window(patch: int) -> Float[np.ndarray, "Q Q 1"]:
    """Returns the weights of a square of side Q = 2 * patch; those of overlapping squares have the sum 1.

    They are the product of a raised cosine for each axis, as in lapped transforms (Malvar & Staelin 1989).
    """
    cosine = np.sin(np.pi * (np.arange(2 * patch) + 0.5) / (2 * patch)) ** 2
    return (cosine[:, None] * cosine)[..., None].astype(np.float32)


def overlap_add(patches: Float[Array, "B h w QQC"], patch: int) -> Float[Array, "B H W C"]:
    """Adds weighted squares of side Q = 2 * patch, centered on the cells of a grid; cuts what is outside of the grid.

    The cells have the side `patch`, which is even.
    """
    B, h, w, _ = patches.shape
    squares = patches.reshape(B, h, w, 2 * patch, 2 * patch, -1) * overlap_window(patch)
    squares = squares.reshape(B, h, w, 2, patch, 2, patch, -1)
    canvas = 0.0
    for i in (0, 1):
        for j in (0, 1):  # the quarters (i, j) of all squares tile the grid
            quarter = unpatchify(squares[:, :, :, i, :, j].reshape(B, h, w, -1), patch)
            canvas += jnp.pad(quarter, [(0, 0), *((k * patch, (1 - k) * patch) for k in (i, j)), (0, 0)])
    half = patch // 2
    return canvas[:, half:-half, half:-half]


def widen_head(head: dict[str, np.ndarray], patch: int) -> dict[str, np.ndarray]:
    """Converts a linear head, kernel [D, 3 * patch^2] and bias, to one that overlaps and predicts the same images."""

    def widen(x: np.ndarray) -> np.ndarray:
        cells = x.reshape(*x.shape[:-1], patch, patch, 3)
        edges = [*[(0, 0)] * (x.ndim - 1), *[(patch // 2, patch // 2)] * 2, (0, 0)]
        return (np.pad(cells, edges) / overlap_window(patch)).reshape(*x.shape[:-1], -1)

    return {name: widen(x) for name, x in head.items()}


class FeatureDecoder(nn.Module):
    """Blocks, with registers among their tokens, and a linear layer that predict encoder features from tokens."""

    blocks: BlocksConfig
    features: int

    @nn.compact
    def __call__(self, x: Tokens) -> Float[Array, "B N F"]:
        c = self.blocks
        registers = self.param("registers", nn.initializers.normal(0.02), (1, REGISTERS, c.width))
        registers = jnp.broadcast_to(registers, (len(x), REGISTERS, c.width)).astype(x.dtype)
        x, _ = run_blocks(c, jnp.concatenate([registers, x], axis=1))
        x = layer_norm(c, "norm")(x)[:, REGISTERS:]
        return nn.Dense(self.features, dtype=c.dtype, precision=matmul_precision(c.dtype), name="head")(x)


class Decoder(nn.Module):
    """Linear embedding, cls token, positions, pre-norm blocks, final norm, linear projection to pixels.

    Attributes:
      blocks: the transformer.
      grid: side of the native latent grid.
      patch: side in pixels of the patch that a latent becomes.
      mean, std: per channel; the network predicts pixels normalized like the encoder's input.
      train_pos_embed: trains the position table, as the PyTorch VQRAE does.
      features: channels of a head that predicts encoder features from the last tokens; 0 omits the head.
      overlap: a token predicts a square of twice the patch's side, and squares are blended where they overlap, so that
        neighbours share the pixels at their border.
      feature_blocks: transformer blocks between the last tokens and the head of `features`; 0: the head is linear.
      keep_grid: latents [B, h, w, C] become images of h * patch x w * patch pixels, with positions resampled to h x w;
        otherwise the latents are resampled, and images are grid * patch pixels wide.
      tokens: number of latents that are free of the grid, see `resampler`; 0: latents are a grid.
    """

    blocks: BlocksConfig
    grid: int
    patch: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    train_pos_embed: bool = False
    features: int = 0
    overlap: bool = False
    feature_blocks: int = 0
    keep_grid: bool = False
    tokens: int = 0

    @property
    def image_size(self) -> int:
        """Side of the decoded images in pixels."""
        return self.grid * self.patch

    @nn.compact
    def __call__(
        self, latent: Float[Array, "B *n C"], with_features: bool = False, present: Bool[Array, "B N"] | None = None
    ) -> Float[Array, "B H W 3"] | tuple[Float[Array, "B H W 3"], Float[Array, "B _ _ F"] | None]:
        """Decodes latents [B, h, w, C]; those of another grid are resampled bilinearly, unless `keep_grid`.

        With `tokens`, latents are [B, N, C]: all, or the first few; only those that are `present` are used.

        Returns:
          Float32 images, in [0, 1] but not clipped. With `with_features` also the predicted encoder features, None
          without that head.
        """
        c, n = self.blocks, self.grid
        h, w = latent.shape[1:3] if self.keep_grid else (n, n)
        dense = {"dtype": c.dtype, "precision": matmul_precision(c.dtype)}
        x = nn.Dense(c.width, **dense, name="embed")(latent)
        if self.tokens:
            x = Canvas(c, self.tokens, name="canvas")(x, h, w, present)
        else:
            x = resize(x, h, w, "bilinear").reshape(len(x), h * w, c.width)
        cls = self.param("cls", nn.initializers.normal(0.02), (1, 1, c.width))
        pos = self.param("pos_embed", lambda _: jnp.asarray(sincos_table(n, c.width)))
        if not self.train_pos_embed:
            pos = jax.lax.stop_gradient(pos)
        pos = resample_positions(ViTConfig(c, self.patch, n), pos, h, w)
        x = jnp.concatenate([jnp.broadcast_to(cls, (len(x), 1, c.width)).astype(x.dtype), x], axis=1)
        x, _ = run_blocks(c, x + pos.astype(x.dtype))
        x = layer_norm(c, "norm")(x)[:, 1:]
        values = 3 * self.patch**2 * (4 if self.overlap else 1)
        pixels = c.shard(nn.Dense(values, **dense, name="pred")(x).astype(jnp.float32)).reshape(len(x), h, w, -1)
        image = (overlap_add if self.overlap else unpatchify)(pixels, self.patch)
        image = image * jnp.asarray(self.std) + jnp.asarray(self.mean)
        if not with_features:
            return image
        if not self.features:
            return image, None
        if self.feature_blocks:
            head = FeatureDecoder(dataclasses.replace(c, depth=self.feature_blocks), self.features, name="features")
        else:
            head = nn.Dense(self.features, **dense, name="features")
        return image, head(x).reshape(len(x), h, w, -1)
