"""Tokens that are free of the grid: learned positions in the image that attend to tokens at other positions."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from vqrae_jax.models.vit import Attention, BlocksConfig, Mlp, Tokens, layer_norm, matmul_precision
from vqrae_jax.quantizers import registry
from vqrae_jax.quantizers.arrays import AnyArray
from vqrae_jax.quantizers.base import Mapped, Quantized, Quantizer, flatten
from vqrae_jax.quantizers.fusion import Fused

Positions = Float[AnyArray, "_ 2"]  # row and column in the image, from 0 to 1
ABSENT = -1e9  # score of a token that is left out


def spread(count: int) -> Float[np.ndarray, "N 2"]:
    """Returns positions of which every first few cover the image evenly: the R2 sequence (Roberts 2018).

    A square number of positions are the centers of the cells of a square grid, in the order of their first visits.
    """
    side, points = math.isqrt(count), count
    if side**2 != count:
        return _r2(count).astype(np.float32)
    while True:
        rows, columns = np.floor(side * _r2(points)).astype(int).T
        visited, first = np.unique(rows * side + columns, return_index=True)
        if len(visited) == count:
            return cell_centers(side, side)[visited[np.argsort(first)]]
        points *= 2


def _r2(count: int) -> Float[np.ndarray, "N 2"]:
    ratio = 1.32471795724474602596  # the root of x^3 = x + 1, a golden ratio in two dimensions
    return (0.5 + np.arange(count)[:, None] / np.array([ratio, ratio**2])) % 1


def cell_centers(h: int, w: int) -> Float[np.ndarray, "N 2"]:
    """Returns the centers of the cells of a grid, by rows."""
    axes = ((np.arange(n, dtype=np.float32) + 0.5) / n for n in (h, w))
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)


def prefix_lengths(tokens: int) -> tuple[int, ...]:
    """Returns the powers of two below the number of tokens, and that number."""
    return (*(2**i for i in range(math.ceil(math.log2(tokens)))), tokens)


class Resampler(nn.Module):
    """Reads tokens at other positions: a mean of those near each position, then blocks of cross-attention.

    Every mean, and every head of the attention, prefers what is near: its scores have the term -d^2 / (2 s^2), d being
    the distance and s learned. Positions may be learned, too, which is how queries choose their regions (VFMTok, Zheng
    et al. 2025, arXiv:2507.08441, samples features there instead).

    Attributes:
      blocks: of the cross-attention; depth 0 leaves the means.
      spacing: initial distance of neighbouring positions, of the sparser side, as a share of the image's side.
    """

    blocks: BlocksConfig
    spacing: float

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B M D"],
        source: Positions,
        target: Positions,
        queries: Float[Array, "1 N D"] | float = 0.0,
        present: Bool[Array, "B M"] | None = None,
    ) -> Float[Array, "B N D"]:
        """Returns a token for each position in `target`, from tokens x at `source` that are `present`."""
        c = self.blocks
        distances = jnp.sum((target[:, None] - source) ** 2, axis=-1)
        width = self.param("log_width", nn.initializers.constant(math.log(self.spacing / 3)), (1 + c.depth, c.heads))
        scores = -0.5 * distances * jnp.exp(-2 * width)[..., None, None]  # [1 + depth, heads, N, M]
        absent = 0.0 if present is None else jnp.where(present, 0.0, ABSENT)[:, None, None]
        near = jax.nn.softmax(scores[0, None, :1] + absent)[:, 0].astype(x.dtype)
        near = jnp.broadcast_to(near, (len(x), *near.shape[1:]))
        mean = jnp.einsum("bnm,bmd->bnd", near, x, precision=matmul_precision(c.dtype))
        y = mean + jnp.asarray(queries, x.dtype)
        context = layer_norm(c, "norm")(x)
        for i in range(c.depth):
            y = CrossBlock(c, name=f"block{i}")(y, context, scores[i + 1] + absent)
        return c.shard(y)


class CrossBlock(nn.Module):
    """Pre-norm block: y + attention(norm(y), context), then y + mlp(norm(y))."""

    cfg: BlocksConfig

    @nn.compact
    def __call__(self, y: Tokens, context: Float[Array, "B M D"], scores: Float[Array, "*b K N M"]) -> Tokens:
        """Returns tokens [B, N, D] that read `context` [B, M, D]; `scores` are added to those of the attention."""
        c = self.cfg
        y = y + Attention(c, name="attn")(layer_norm(c, "norm1")(y), context=context, scores=scores)[0]
        return y + Mlp(c, name="mlp")(layer_norm(c, "norm2")(y))


class Queries(nn.Module):
    """Learned queries that read the latent grid of an image: grid to tokens."""

    blocks: BlocksConfig
    tokens: int

    @nn.compact
    def __call__(self, z: Float[Array, "B h w C"]) -> Float[Array, "B N C"]:
        c, (B, h, w, C) = self.blocks, z.shape
        centers = self.param("centers", lambda _: jnp.asarray(spread(self.tokens)))
        queries = self.param("queries", nn.initializers.normal(0.02), (1, self.tokens, C))
        resampler = Resampler(c, self.tokens**-0.5, name="resampler")
        y = resampler(z.reshape(B, h * w, C).astype(c.dtype), cell_centers(h, w), centers, queries)
        norm = nn.LayerNorm(use_bias=False, use_scale=False, use_fast_variance=False, name="norm")
        return norm(y.astype(jnp.float32))


class Resampled(Mapped):
    """A grid of latents becomes N tokens by learned queries, in front of a quantizer; indices are [B, N].

    Every token has mean 0 and variance 1 over its channels: no loss can shrink them. `nested` trains on the first 1, 2,
    4, ... or all tokens of each image (nested dropout, Rippel et al. 2014; FlexTok, Bachmann et al. 2025,
    arXiv:2502.13967), whose other indices are then -1, although they count for the codebook; any of these prefixes
    decodes. The quantizer has one index per token then.

    An image with a latent that is not finite has no finite token. `params`: queries. The variables of the inner
    quantizer are under `quantizer`.
    """

    quantizer: registry.Inside
    blocks: BlocksConfig
    tokens: int
    nested: bool = False

    @property
    def channels(self) -> int:
        return self.blocks.width

    @property
    def prefixes(self) -> tuple[int, ...]:
        return prefix_lengths(self.tokens) if self.nested else self.quantizer.prefixes

    def setup(self):
        self.queries = Queries(self.blocks, self.tokens)

    def __call__(self, z: Float[AnyArray, "B h w C"], train: bool = False) -> Quantized:
        flat, finite = flatten(z, self.channels)
        # NaN bypasses the network: inside, it would reach the gradient of its kernels.
        whole = jnp.all(finite.reshape(len(z), -1), axis=1)[:, None, None]
        out = self.quantizer(jnp.where(whole, self.queries(flat.reshape(z.shape)), jnp.nan), train)
        if not (self.nested and train):
            return out
        lengths = jax.random.choice(self.make_rng("codes"), jnp.asarray(self.prefixes), (len(z), 1))
        return out.replace(indices=jnp.where(jnp.arange(self.tokens) < lengths, out.indices, -1))


def replace_blocks(quantizer: Quantizer, **fields: Any) -> Quantizer:
    """Returns the quantizer with other settings of the blocks of its `Resampled`, if it has one."""
    if isinstance(quantizer, Resampled):
        return quantizer.clone(blocks=dataclasses.replace(quantizer.blocks, **fields))
    if isinstance(quantizer, Fused):
        return quantizer.clone(quantizer=replace_blocks(quantizer.quantizer, **fields))
    return quantizer


class Canvas(nn.Module):
    """Places tokens that are free of the grid on the grid of a decoder: tokens to grid."""

    blocks: BlocksConfig
    tokens: int

    @nn.compact
    def __call__(self, x: Tokens, h: int, w: int, present: Bool[Array, "B N"] | None = None) -> Float[Array, "B M D"]:
        """Returns h * w tokens; x may be the first few tokens."""
        centers = self.param("centers", lambda _: jnp.asarray(spread(self.tokens)))[: x.shape[1]]
        blocks = dataclasses.replace(self.blocks, depth=1)
        return Resampler(blocks, self.tokens**-0.5, name="resampler")(x, centers, cell_centers(h, w), present=present)
