"""One plain ViT for every encoder family (DINOv2, DINOv3, SigLIP, SigLIP2, MAE) and for the decoder.

Axes: B batch, H W pixels, h w patch grid, N tokens, D width, K heads, d head width, P patch side, L depth.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vqrae_jax.models.layers import ACTIVATIONS, Heads, KeyValue, attend, attend_cached
from vqrae_jax.quantizers.arrays import AnyArray
from vqrae_jax.resize import resize

Tokens = Float[Array, "B N D"]
Rope = tuple[Float[Array, "*b n d"], ...]  # cosine and sine of every token and channel; then those of keys if different
Modulation = Float[Array, "L B 6 D"]  # of every block: shift, scale and gate of the attention, then of the MLP
# A final LayerNorm divides by the length of a token: a part that all tokens share keeps brightness and contrast.
SAME_SCALE = nn.initializers.normal(3.0)
# What blocks add to their input begins small: they train faster close to the identity.
ALMOST_ZERO = nn.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")


@dataclasses.dataclass(frozen=True)
class BlocksConfig:
    """A stack of pre-norm transformer blocks."""

    width: int
    depth: int
    heads: int
    mlp: int
    act: str = "gelu"  # a name in `layers.ACTIVATIONS`
    gated: bool = False  # the MLP is act(gate) * up
    layer_scale: bool = False
    unbiased: tuple[str, ...] = ()  # layers without bias: "query", "key", "value", "out", "up", "gate", "down"
    norm_eps: float = 1e-6
    qk_norm: bool = False  # LayerNorm of the queries and keys of every head (Dehghani et al. 2023)
    causal: bool = False  # tokens attend to themselves and to earlier ones
    dropout: float = 0.0  # of the output of attention and MLP, if the caller passes the stream "dropout"
    remat: bool = False  # recomputes each block in the backward pass
    dtype: str = "float32"  # of the activations; norms and softmax stay float32
    attention: Literal["xla", "cudnn"] = "xla"  # "cudnn": NVIDIA's kernel, for bfloat16; without a GPU it is "xla"
    # Identity on tokens [B, N, D] that constrains their sharding between blocks. Without it, parameters that are split
    # over the devices of a batch make the partitioner split the channels of the tokens.
    shard_activations: Callable[[Any], Any] | None = None

    @property
    def cudnn(self) -> bool:
        """Tells whether attention is NVIDIA's kernel, which cannot be traced without a GPU."""
        return self.attention == "cudnn" and jax.default_backend() == "gpu"

    def shard(self, x: Float[Array, "B N *D"]) -> Float[Array, "B N *D"]:
        """Applies `shard_activations`."""
        return x if self.shard_activations is None else self.shard_activations(x)


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """An image encoder: patch embedding, prefix tokens, positions, blocks."""

    blocks: BlocksConfig
    patch: int
    grid: int = 0  # side of the stored position grid; 0 with rotary positions
    pos: Literal["learned", "rope"] = "learned"
    antialias: bool = False  # resamples the position grid with antialiasing
    rope_theta: float = 100.0
    cls: bool = True
    registers: int = 0
    patch_bias: bool = True

    @property
    def prefix(self) -> int:
        """Number of tokens in front of the patches."""
        return int(self.cls) + self.registers


def patchify(image: Float[AnyArray, "B H W C"], patch: int) -> Float[Array, "B h w PPC"]:
    """Cuts images into patches of patch * patch * C values, in the order row, column, channel."""
    B, H, W, C = image.shape
    if H % patch or W % patch:
        raise ValueError(f"image size {H}x{W} is not divisible by the patch size {patch}")
    grid = image.reshape(B, H // patch, patch, W // patch, patch, C)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(B, H // patch, W // patch, patch * patch * C)


def unpatchify(patches: Float[Array, "B h w PPC"], patch: int) -> Float[Array, "B H W C"]:
    """Inverts `patchify`."""
    B, h, w, _ = patches.shape
    grid = patches.reshape(B, h, w, patch, patch, -1)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(B, h * patch, w * patch, -1)


def rope_table(h: int, w: int, head_width: int, theta: float) -> Rope:
    """Returns cosine and sine of DINOv3's axial rotary embedding: half of the channels for each axis, in [-1, 1]."""
    y, x = (2 * (jnp.arange(n, dtype=jnp.float32) + 0.5) / n - 1 for n in (h, w))
    position = jnp.stack(jnp.meshgrid(y, x, indexing="ij"), -1).reshape(h * w, 2, 1)
    frequency = theta ** -(jnp.arange(head_width // 4, dtype=jnp.float32) * (4.0 / head_width))
    angle = jnp.tile((2 * jnp.pi * position * frequency).reshape(h * w, head_width // 2), (1, 2))
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Heads, rope: Rope) -> Heads:
    """Rotates the patch tokens in float32; prefix tokens (cls, registers) have no position."""
    cos, sin = (table[..., None, :] for table in rope)
    prefix, patches = jnp.split(x, [x.shape[1] - cos.shape[-3]], axis=1)
    patches = patches.astype(jnp.float32)
    a, b = jnp.split(patches, 2, -1)
    rotated = patches * cos + jnp.concatenate([-b, a], -1) * sin
    return jnp.concatenate([prefix, rotated.astype(x.dtype)], axis=1)


def matmul_precision(dtype: str) -> jax.lax.Precision | None:
    """Returns full precision for float32, which TPUs and recent GPUs otherwise multiply with fewer bits."""
    return jax.lax.Precision.HIGHEST if dtype == "float32" else None


def layer_norm(cfg: BlocksConfig, name: str | None = None, affine: bool = True) -> nn.LayerNorm:
    """Builds a LayerNorm; E[x^2] - E[x]^2 would lose digits that pretrained features need."""
    return nn.LayerNorm(cfg.norm_eps, cfg.dtype, use_bias=affine, use_scale=affine, use_fast_variance=False, name=name)


class Attention(nn.Module):
    """Multi-head attention."""

    cfg: BlocksConfig

    @nn.compact
    def __call__(
        self,
        x: Tokens,
        rope: Rope | None = None,
        cache: KeyValue | None = None,
        first: Any = 0,
        context: Float[Array, "B _ D"] | None = None,
        scores: Any = None,
    ) -> tuple[Tokens, KeyValue | None]:
        """Returns mixed tokens of x or, if it is not None, of `context`; `scores` are added to those of the attention.

        With a `cache` of the tokens before x, of which x[:, 0] is number `first`, also returns that with x.
        """
        c, sources = self.cfg, {"query": x} | dict.fromkeys(("key", "value"), x if context is None else context)
        dense = functools.partial(nn.DenseGeneral, dtype=c.dtype, precision=matmul_precision(c.dtype))
        heads = (c.heads, c.width // c.heads)
        query, key, value = (
            dense(heads, use_bias=name not in c.unbiased, name=name)(source) for name, source in sources.items()
        )
        if c.qk_norm:
            query, key = layer_norm(c, "norm_query")(query), layer_norm(c, "norm_key")(key)
        if rope is not None:
            query, key = rotate(query, rope[:2]), rotate(key, rope[-2:])
        precision = matmul_precision(c.dtype)
        if cache is not None:
            x, cache = attend_cached(query, key, value, cache, first, precision)
        elif c.cudnn and scores is None:
            x = jax.nn.dot_product_attention(query, key, value, is_causal=c.causal, implementation="cudnn")
        else:
            x = attend(query, key, value, precision, c.causal, scores)
        out = dense(c.width, axis=(-2, -1), use_bias="out" not in c.unbiased, kernel_init=ALMOST_ZERO, name="out")
        return out(x), cache


class Mlp(nn.Module):
    """Two-layer perceptron, optionally gated."""

    cfg: BlocksConfig

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        c = self.cfg

        def dense(width: int, name: str, init: Any = nn.linear.default_kernel_init) -> nn.Dense:
            precision = matmul_precision(c.dtype)
            return nn.Dense(width, name not in c.unbiased, c.dtype, precision=precision, kernel_init=init, name=name)

        act = ACTIVATIONS[c.act]
        hidden = dense(c.mlp, "up")(x)
        hidden = act(dense(c.mlp, "gate")(x)) * hidden if c.gated else act(hidden)
        return dense(c.width, "down", ALMOST_ZERO)(hidden)


class LayerScale(nn.Module):
    """A learned factor per channel (Touvron et al. 2021)."""

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        return x * scale.astype(x.dtype)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    cfg: BlocksConfig

    @nn.compact
    def __call__(
        self, x: Tokens, rope: Rope | None = None, modulation: Any = None, cache: KeyValue | None = None, first: Any = 0
    ) -> tuple[Tokens, KeyValue | None]:
        """Returns tokens and cache as `Attention` does; for `modulation` see Peebles & Xie 2023, arXiv:2212.09748."""
        c = self.cfg
        rows = None if modulation is None else modulation.astype(x.dtype)[:, :, None]

        def norm(x: Tokens, i: int) -> Tokens:
            x = layer_norm(c, f"norm{i}")(x)
            return x if rows is None else x * (1 + rows[:, 3 * i - 2]) + rows[:, 3 * i - 3]

        def finish(y: Tokens, i: int) -> Tokens:
            y = LayerScale(name=f"scale{i}")(y) if c.layer_scale else y
            y = nn.Dropout(c.dropout)(y, deterministic=not self.has_rng("dropout")) if c.dropout else y
            return y if rows is None else y * rows[:, 3 * i - 1]

        y, cache = Attention(c, name="attn")(norm(x, 1), rope, cache, first)
        x = x + finish(y, 1)
        return x + finish(Mlp(c, name="mlp")(norm(x, 2)), 2), cache


def recomputing_block(cfg: BlocksConfig) -> type[Block]:
    """Returns `Block` with a gradient that recomputes all but products of matrices, or all (Chen et al. 2016).

    It needs half the memory of a gradient that recomputes nothing (785 tokens, 12 blocks, compiled for v5e), and on a
    CPU less time. In bfloat16, on accelerators, the N x N products of attention are recomputed as well.
    """
    policies = jax.checkpoint_policies
    if cfg.remat:
        policy = policies.nothing_saveable
    elif cfg.cudnn:
        policy = policies.everything_saveable  # others would run the kernel again
    elif cfg.dtype == "float32":
        policy = policies.dots_saveable
    else:
        policy = policies.dots_with_no_batch_dims_saveable
    return nn.remat(Block, prevent_cse=False, policy=policy)


def run_blocks(
    cfg: BlocksConfig,
    x: Tokens,
    rope: Rope | None = None,
    taps: tuple[int, ...] = (),
    modulation: Modulation | None = None,
    block: Block | None = None,
) -> tuple[Tokens, list[Tokens]]:
    """Creates (unless `block` is one) and runs the blocks inside the calling module's compact method.

    Their parameters are stacked along a leading axis L in `blocks` and scanned: one block is compiled, whatever the
    depth. Returns the output of the last block, and of the blocks `taps`, of which 0 is the first.
    """
    last, inner = cfg.depth - 1, sorted(set(taps) - {cfg.depth - 1})
    # The row of `tapped` that each block writes; len(inner), which is out of range, writes none.
    rows = jnp.asarray([inner.index(i) if i in inner else len(inner) for i in range(cfg.depth)])

    def body(block: nn.Module, carry: tuple[Any, Any], inputs: Any, rope: Any) -> tuple[tuple[Any, Any], None]:
        (x, tapped), (row, modulation) = carry, inputs
        x = cfg.shard(block(x, rope, modulation)[0])
        return (x, tapped.at[row].set(x, mode="drop") if inner else tapped), None

    streams = {"params": True, "dropout": True}
    scan = nn.scan(body, {"params": 0}, split_rngs=streams, in_axes=(0, nn.broadcast), length=cfg.depth)
    tapped = jnp.zeros((len(inner), *x.shape), x.dtype)
    block = recomputing_block(cfg)(cfg, name="blocks") if block is None else block
    (x, tapped), _ = scan(block, (cfg.shard(x), tapped), (rows, modulation), rope)
    return x, [x if i == last else tapped[inner.index(i)] for i in taps]


class ViT(nn.Module):
    """Vision transformer from normalized pixels to the tokens of chosen blocks, before any final norm."""

    cfg: ViTConfig

    @nn.compact
    def __call__(
        self, image: Float[AnyArray, "B H W 3"], taps: tuple[int, ...], keep_prefix: bool = False
    ) -> tuple[list[Tokens], tuple[int, int]]:
        """Returns the tokens of the blocks `taps`, of which 0 is the first, and the patch grid (h, w).

        The prefix tokens (cls, registers) are among them if `keep_prefix`.
        """
        c, b = self.cfg, self.cfg.blocks
        normal = nn.initializers.normal(0.02)

        # Patch embedding.
        patches = patchify(image, c.patch).astype(b.dtype)
        B, h, w, _ = patches.shape
        dense = functools.partial(nn.Dense, dtype=b.dtype, precision=matmul_precision(b.dtype), bias_init=SAME_SCALE)
        x = dense(b.width, c.patch_bias, name="patch_embed")(patches).reshape(B, h * w, b.width)

        # Prefix tokens and positions; registers have no position.
        cls = self.param("cls", normal, (1, 1, b.width)) if c.cls else jnp.zeros((1, 0, b.width))
        registers = self.param("registers", normal, (1, c.registers, b.width)) if c.registers else cls[:, :0]
        rope = None
        if c.pos == "rope":
            rope = rope_table(h, w, b.width // b.heads, c.rope_theta)
        else:
            pos = self.param("pos_embed", normal, (1, int(c.cls) + c.grid**2, b.width))
            pos = resample_positions(c, pos, h, w)
            cls, x = cls + pos[:, : int(c.cls)], x + pos[:, int(c.cls) :].astype(x.dtype)
        prefix = jnp.concatenate([cls, registers], axis=1).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(prefix, (B, *prefix.shape[1:])), x], axis=1)

        # Transformer.
        _, outputs = run_blocks(b, x, rope, taps)
        return [tokens if keep_prefix else tokens[:, c.prefix :] for tokens in outputs], (h, w)


def resample_positions(cfg: ViTConfig, table: Float[AnyArray, "1 n D"], h: int, w: int) -> Float[AnyArray, "1 m D"]:
    """Resamples a table of positions (cls first, then the grid by rows) to a grid of h x w, as PyTorch does."""
    if (h, w) == (cfg.grid, cfg.grid):
        return table
    cls, width = int(cfg.cls), table.shape[-1]
    grid = table[:, cls:].reshape(1, cfg.grid, cfg.grid, width)
    grid = resize(grid, h, w, "bicubic_antialias" if cfg.antialias else "bicubic")
    return jnp.concatenate([table[:, :cls], grid.reshape(1, h * w, width)], axis=1)
