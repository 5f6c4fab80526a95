"""One plain ViT for every family: DINOv2 (with and without registers), DINOv3, SigLIP, SigLIP2, MAE, and our decoder.

Axes: B batch, H W pixels, h w patch grid, N tokens, D width, P patch side, L depth.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vqrae_jax.models import attention_tpu, low_precision
from vqrae_jax.models.activations import ACTIVATIONS
from vqrae_jax.models.attention import Heads, attend
from vqrae_jax.resize import resize

Tokens = Float[Array, "B N D"]


@dataclasses.dataclass(frozen=True)
class Spread:
    """How the work on tokens is spread over devices, as whoever shards the model says; else it is left to the compiler.

    Attributes:
      pin: identity on the tokens between blocks that says where they live: parameters split over the devices of a batch
        would otherwise draw the partitioner into splitting the tokens' channels as well.
      per_device: makes a function of arrays [B, N, D], and the width of the heads in D, one that every device runs on
        its part of them: the partitioner cannot split a kernel.
    """

    pin: Callable[[Tokens], Tokens] = lambda x: x
    per_device: Callable[[Callable[..., Any], int], Callable[..., Any]] = lambda function, width: function


@dataclasses.dataclass(frozen=True)
class BlocksConfig:
    """A stack of pre-norm transformer blocks."""

    width: int
    depth: int
    heads: int
    mlp: int
    act: Literal["gelu", "gelu_tanh", "silu"] = "gelu"
    gated: bool = False  # mlp is act(gate) * up
    layer_scale: bool = False
    unbiased: tuple[str, ...] = ()  # of query, key, value: those without a bias
    norm_eps: float = 1e-6
    scan: bool = False  # parameters stacked along a leading axis and scanned
    remat: bool = False  # recompute each block in the backward pass
    dtype: str = "float32"  # of activations; norms and softmax stay float32
    # cudnn: NVIDIA's fused kernel, in bfloat16, where there is a GPU; pallas: `attention_tpu`, where there is a TPU
    attention: Literal["xla", "cudnn", "pallas"] = "xla"
    matmul: Literal["dtype", "int8", "fp8"] = "dtype"  # of the blocks' dense layers; eight bits for frozen weights only
    spread: Spread = Spread()


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """An image encoder: patch embedding, prefix tokens, positions, blocks, final norm."""

    blocks: BlocksConfig
    patch: int
    grid: int = 0  # side of the stored position grid; 0 with rope
    pos: Literal["learned", "rope"] = "learned"
    antialias: bool = False  # how the position grid is resampled
    rope_theta: float = 100.0
    cls: bool = True
    registers: int = 0
    patch_bias: bool = True

    @property
    def prefix(self) -> int:
        """Tokens in front of the patches."""
        return int(self.cls) + self.registers


def patchify(image: Float[Array, "B H W C"], patch: int) -> Float[Array, "B h w P*P*C"]:
    """Cuts an image into patches; within a patch the order is row, column, channel."""
    B, H, W, C = image.shape
    if H % patch or W % patch:
        raise ValueError(f"image size {H}x{W} is not divisible by the patch size {patch}")
    grid = image.reshape(B, H // patch, patch, W // patch, patch, C)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(B, H // patch, W // patch, patch * patch * C)


def unpatchify(patches: Float[Array, "B h w P*P*C"], patch: int) -> Float[Array, "B H W C"]:
    """The inverse of `patchify`."""
    B, h, w, _ = patches.shape
    grid = patches.reshape(B, h, w, patch, patch, -1)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(B, h * patch, w * patch, -1)


Rope = tuple[Float[Array, "N d"], Float[Array, "N d"]]


def rope_table(h: int, w: int, head_width: int, theta: float) -> Rope:
    """cos and sin of DINOv3's axial rotary embedding: patch centres in [-1, 1], half of the channels per axis."""
    y, x = (2 * (jnp.arange(n, dtype=jnp.float32) + 0.5) / n - 1 for n in (h, w))
    position = jnp.stack(jnp.meshgrid(y, x, indexing="ij"), -1).reshape(h * w, 2, 1)
    frequency = theta ** -jnp.arange(0.0, 1.0, 4.0 / head_width, dtype=jnp.float32)
    angle = jnp.tile((2 * jnp.pi * position * frequency).reshape(h * w, head_width // 2), (1, 2))
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "B N K d"], rope: Rope) -> Float[Array, "B N K d"]:
    """Rotates the patch tokens, in float32; tokens in front of them (cls, registers) have no position."""
    cos, sin = (t[:, None] for t in rope)
    prefix, patches = jnp.split(x, [x.shape[1] - cos.shape[0]], axis=1)
    patches = patches.astype(jnp.float32)
    a, b = jnp.split(patches, 2, -1)
    turned = patches * cos + jnp.concatenate([-b, a], -1) * sin
    return jnp.concatenate([prefix, turned.astype(x.dtype)], axis=1)


def matmul_precision(dtype: str) -> jax.lax.Precision | None:
    """float32 means float32: TPUs and newer GPUs otherwise multiply with fewer bits."""
    return jax.lax.Precision.HIGHEST if dtype == "float32" else None


def dense_options(cfg: BlocksConfig) -> dict[str, Any]:
    """What every dense layer of the blocks is told."""
    options = {"dtype": cfg.dtype, "precision": matmul_precision(cfg.dtype)}
    if cfg.matmul != "dtype":
        options["dot_general"] = functools.partial(low_precision.dot_general, bits=cfg.matmul)
    return options


def attending(cfg: BlocksConfig) -> Callable[[Heads, Heads, Heads], Heads]:
    """`attend` for these blocks; for bfloat16 its gradient computes the N x N weights again (Chen et al. 2016).

    Accelerators, whose type that is, multiply faster than they read such weights back: with 785 tokens the gradient
    through twelve blocks moves a third of the bytes on a TPU (compiled for v5e). A CPU takes a tenth longer so, and
    where whole blocks are computed again there is nothing to gain.
    """
    found = functools.partial(attend, precision=matmul_precision(cfg.dtype))
    again = cfg.dtype == "bfloat16" and not cfg.remat
    return jax.checkpoint(found, prevent_cse=not cfg.scan) if again else found


def layer_norm(cfg: BlocksConfig, name: str, affine: bool = True) -> nn.LayerNorm:
    # E[x^2] - E[x]^2 would lose digits that the pretrained features have.
    return nn.LayerNorm(cfg.norm_eps, cfg.dtype, use_bias=affine, use_scale=affine, use_fast_variance=False, name=name)


class FlatDense(nn.Module):
    """From [B, N, D] to [B, N, E] with the parameters of an `nn.DenseGeneral` that takes D or E apart into heads.

    What has the form [B, N, K, d] a TPU would keep with its tokens in lanes: good for XLA's attention, not the kernel.
    """

    cfg: BlocksConfig
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N E"]:
        options = dense_options(self.cfg)
        sides = math.prod(self.inputs), math.prod(self.outputs)

        def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return nn.initializers.lecun_normal()(key, sides).reshape(shape)

        kernel = self.param("kernel", draw, (*self.inputs, *self.outputs)).reshape(sides)
        bias = self.param("bias", nn.initializers.zeros, self.outputs).reshape(-1) if self.use_bias else None
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.cfg.dtype)
        product = options.get("dot_general", jax.lax.dot_general)
        y = product(x, kernel, (((2,), (0,)), ((), ())), precision=options["precision"])
        return y if bias is None else y + bias


class Attention(nn.Module):
    """Multi-head self-attention over [B, N, D]."""

    cfg: BlocksConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], rope: Rope | None = None) -> Float[Array, "B N D"]:
        c = self.cfg
        heads = (c.heads, c.width // c.heads)
        flat = c.attention == "pallas"
        if flat:
            head = functools.partial(FlatDense, c, (c.width,), heads)
            out = FlatDense(c, heads, (c.width,), name="out")
        else:
            head = functools.partial(nn.DenseGeneral, heads, **dense_options(c))
            out = nn.DenseGeneral(c.width, (-2, -1), **dense_options(c), name="out")
        query, key, value = (head(use_bias=n not in c.unbiased, name=n)(x) for n in ("query", "key", "value"))
        if rope is not None:
            query, key = (rotate(y.reshape(*y.shape[:2], *heads), rope).reshape(y.shape) for y in (query, key))
        if flat:
            mixed = attention_tpu.attend(query, key, value, heads[1], c.spread.per_device, matmul_precision(c.dtype))
        # NVIDIA's kernel cannot even be traced where there is no GPU.
        elif c.attention == "cudnn" and jax.default_backend() == "gpu":
            mixed = jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
        else:
            mixed = attending(c)(query, key, value)
        return out(mixed)


class Mlp(nn.Module):
    """Two-layer perceptron, or three with a gate."""

    cfg: BlocksConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        c = self.cfg
        dense = functools.partial(nn.Dense, **dense_options(c))
        act = ACTIVATIONS[c.act]
        hidden = dense(c.mlp, name="up")(x)
        hidden = act(dense(c.mlp, name="gate")(x)) * hidden if c.gated else act(hidden)
        return dense(c.width, name="down")(hidden)


class LayerScale(nn.Module):
    """A learned factor per channel (Touvron et al. 2021)."""

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        return x * scale.astype(x.dtype)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    cfg: BlocksConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], rope: Rope | None = None) -> Float[Array, "B N D"]:
        c = self.cfg
        attended = Attention(c, name="attn")(layer_norm(c, "norm1")(x), rope)
        x = x + (LayerScale(name="scale1")(attended) if c.layer_scale else attended)
        hidden = Mlp(c, name="mlp")(layer_norm(c, "norm2")(x))
        return x + (LayerScale(name="scale2")(hidden) if c.layer_scale else hidden)


def run_blocks(
    cfg: BlocksConfig, x: Float[Array, "B N D"], rope: Rope | None = None, taps: tuple[int, ...] = ()
) -> tuple[Float[Array, "B N D"], list[Float[Array, "B N D"]]]:
    """Creates and runs the blocks inside the calling module's compact method.

    Parameters are `block00`, `block01`, ... or, scanned, `blocks` with a leading axis L; `models.stacking` converts
    between the two.

    Returns the last block's output and the outputs of the blocks in `taps` (0 is the first).
    """
    pin = cfg.spread.pin
    x = pin(x)
    block = nn.remat(Block, prevent_cse=not cfg.scan) if cfg.remat else Block
    if not cfg.scan:
        outputs = []
        for i in range(cfg.depth):
            x = pin(block(cfg, name=f"block{i:02d}")(x, rope))
            outputs.append(x)
        return x, [outputs[i] for i in taps]

    last = cfg.depth - 1

    def body(one: nn.Module, carry: jax.Array, rope: Rope | None) -> tuple[jax.Array, jax.Array | None]:
        carry = pin(one(carry, rope))
        return carry, carry if set(taps) - {last} else None  # of all blocks or none

    scan = nn.scan(body, {"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=cfg.depth)
    x, outputs = scan(block(cfg, name="blocks"), x, rope)
    return x, [x if i == last else outputs[i] for i in taps]


class ViT(nn.Module):
    """Normalised pixels -> tokens of the chosen blocks, before any final norm."""

    cfg: ViTConfig

    @nn.compact
    def __call__(
        self, image: Float[Array, "B H W 3"], taps: tuple[int, ...], keep_prefix: bool = False
    ) -> tuple[list[Float[Array, "B N D"]], tuple[int, int]]:
        """Returns the outputs of the blocks `taps`, without prefix tokens (cls, registers) unless these are to be kept,
        and the patch grid (h, w).
        """
        c, width = self.cfg, self.cfg.blocks.width
        patches = patchify(image, c.patch).astype(c.blocks.dtype)
        B, h, w, _ = patches.shape
        embed = nn.Dense(
            width, c.patch_bias, dtype=c.blocks.dtype, precision=matmul_precision(c.blocks.dtype), name="patch_embed"
        )
        x = embed(patches).reshape(B, h * w, width)
        prefix, rope = self._prefix(), None
        if c.pos == "rope":
            rope = rope_table(h, w, width // c.blocks.heads, c.rope_theta)
        else:
            pos = self._positions(h, w)
            x = x + pos[:, int(c.cls) :].astype(x.dtype)
            prefix = [token + pos[:, :1] if c.cls and i == 0 else token for i, token in enumerate(prefix)]
        prefix = [jnp.broadcast_to(token, (B, *token.shape[1:])).astype(x.dtype) for token in prefix]
        _, outputs = run_blocks(c.blocks, jnp.concatenate([*prefix, x], axis=1), rope, taps)
        return [tokens if keep_prefix else tokens[:, c.prefix :] for tokens in outputs], (h, w)

    def _prefix(self) -> list[Float[Array, "1 n D"]]:
        normal, width = nn.initializers.normal(0.02), self.cfg.blocks.width
        tokens = [self.param("cls", normal, (1, 1, width))] if self.cfg.cls else []
        if self.cfg.registers:
            tokens.append(self.param("registers", normal, (1, self.cfg.registers, width)))
        return tokens

    def _positions(self, h: int, w: int) -> Float[Array, "1 n D"]:
        """The stored table (cls first, then rows), its grid resampled to h x w when that is another one."""
        c = self.cfg
        table = self.param("pos_embed", nn.initializers.normal(0.02), (1, int(c.cls) + c.grid**2, c.blocks.width))
        return resample_positions(c, table, h, w)


def resample_positions(cfg: ViTConfig, table: Float[Array, "1 n D"], h: int, w: int) -> Float[Array, "1 m D"]:
    """A table of cfg.grid x cfg.grid positions (after that of cls) for a grid of h x w, as PyTorch resamples it."""
    if (h, w) == (cfg.grid, cfg.grid):
        return table
    cls, width = int(cfg.cls), table.shape[-1]
    grid = table[:, cls:].reshape(1, cfg.grid, cfg.grid, width)
    grid = resize(grid, h, w, "bicubic_antialias" if cfg.antialias else "bicubic")
    return jnp.concatenate([table[:, :cls], grid.reshape(1, h * w, width)], axis=1)
