"""A transformer over codes: bidirectional for masked diffusion, or causal for autoregression.

The codes of an image are one sequence of N positions times L levels: grid by grid, row by row, and at each position its
levels (of a residual quantizer) or groups (of a product quantizer). Code j is level j % L of position j // L. This is
the order in which tokenizers return indices [h, w, L]. A level refines the levels before it at its position, which it
therefore follows, and later positions are predicted from complete ones. The first codes of a sequence are whole rows of
the image, which can be kept while the others are sampled.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vqrae_jax.losses.cross_entropy import cross_entropy
from vqrae_jax.models import vit
from vqrae_jax.models.layers import ACTIVATIONS, KeyValue

Codes = Int[Array, "B T"]  # T = N L
Label = Int[Array, " B"]
Order = Int[Array, "B N"]
Cache = tuple[list[Any], list[KeyValue], Any]  # parameters, keys and values of every block; modulation


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Sizes and options of a generator."""

    blocks: vit.BlocksConfig  # `causal` decides between masked diffusion and autoregression
    num_embeddings: int  # K, of every level
    grids: tuple[tuple[int, int], ...]  # rows and columns of each grid; several with a multiscale quantizer
    levels: int = 1  # codes per position
    classes: int = 0  # 0: unconditional
    class_token: bool = True  # the class is a token in front of the codes
    adaln: bool = False  # the class modulates the norms of every block, at first not at all (adaLN-zero)
    registers: int = 0  # learned tokens in front of the codes
    pos: Literal["learned", "rope"] = "learned"
    rope_theta: float = 100.0
    # Above 0, the tokenizer's codebook vectors replace the learned table: the variable `frozen/code_vectors` [L, K, C],
    # which the caller sets, scaled to about unit variance.
    code_channels: int = 0
    tied: bool = True  # the head multiplies with the table of the input
    # Sizes whose product is K: a code is one digit for each, most significant first, which are predicted independently
    # of each other (MaskBit: Weber et al. 2024, arXiv:2409.16211). (512, 256) has a head of 768 columns for K = 2^17.
    factors: tuple[int, ...] = ()

    def __post_init__(self):
        if math.prod(self.vocabulary) != self.num_embeddings:
            raise ValueError(f"factors={self.factors}: the product must be num_embeddings={self.num_embeddings}")
        if self.factors and self.tied and self.code_channels:
            raise ValueError("tied=True: codebook vectors have no digits; set tied=False or factors=()")

    @property
    def vocabulary(self) -> tuple[int, ...]:
        return self.factors or (self.num_embeddings,)

    @property
    def positions(self) -> int:
        return sum(h * w for h, w in self.grids)

    @property
    def length(self) -> int:
        return self.positions * self.levels


class CodeTransformer(nn.Module):
    """Embedded codes with positions, a class, pre-norm blocks, and a head.

    A causal generator predicts the codes in the order of the sequence or of permuted positions (RAR, arXiv:2411.00776).
    The input for a code is the one before, with the positions of both: that of the predicted code is RAR's target-aware
    embedding and rotates queries. The first input is hidden, at the position of the last code, which is never an input.
    """

    config: Architecture

    def setup(self):
        c, b = self.config, self.config.blocks
        normal = nn.initializers.normal(0.02)
        dense = {"dtype": b.dtype, "precision": vit.matmul_precision(b.dtype)}
        table = (c.levels, sum(c.vocabulary), b.width)
        if c.code_channels:
            vectors = (c.levels, c.num_embeddings, c.code_channels)
            self.code_vectors = self.variable("frozen", "code_vectors", jnp.zeros, vectors)
            scaled = nn.initializers.variance_scaling(0.02**2, "fan_in", "normal", batch_axis=(0,))
            self.code_proj = self.param("code_proj", scaled, (c.levels, c.code_channels, b.width))
        else:
            self.code_embed = self.param("code_embed", normal, table)
        if not c.tied:
            self.head_embed = self.param("head_embed", normal, table)
        self.code_bias = self.param("code_bias", nn.initializers.zeros, table[:2])
        self.hidden_embed = self.param("hidden_embed", normal, (b.width,))
        self.level_embed = self.param("level_embed", normal, (c.levels, b.width))
        positions = c.positions if c.pos == "learned" else len(c.grids)  # with rotary ones, a vector for each grid
        self.pos_embed = self.param("pos_embed", normal, (positions, b.width))
        if b.causal:
            self.target_embed = self.param("target_embed", normal, (c.positions, b.width))
        if c.classes:
            self.class_embed = self.param("class_embed", normal, (c.classes + 1, b.width))
        if c.registers:
            self.registers = self.param("registers", normal, (1, c.registers, b.width))
        if c.adaln and c.classes:
            self.norm_class = vit.layer_norm(b, affine=False)
            self.modulation = nn.DenseGeneral((b.depth, 6, b.width), kernel_init=nn.initializers.zeros, **dense)
        self.norm_embed, self.norm, self.norm_head = (vit.layer_norm(b) for _ in range(3))
        self.blocks = vit.recomputing_block(b)(b)
        self.head = nn.Dense(b.width, **dense)

    def __call__(self, indices: Codes, label: Label | None = None, order: Order | None = None) -> Float[Array, "B T F"]:
        """Returns float32 logits; F is K, or the sum of `factors`, whose logits follow each other.

        Args:
          indices: in [0, K); K where one is hidden. Causal: the logits of a code depend on earlier codes only.
          label: in [0, classes); `classes` is the unconditional label, which None gives to all images. Train with
            about one image in ten unconditional for classifier-free guidance.
          order: the positions in the order in which a causal generator predicts them; None: 0, 1, ...
        """
        return self._logits(self._features(indices, label, order), slice(None)).reshape(*indices.shape, -1)

    def cross_entropy(
        self,
        indices: Codes,
        label: Label | None = None,
        targets: Codes | None = None,
        order: Order | None = None,
        smoothing: float = 0.0,
    ) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
        """Returns -log p of every code in nats, and whether it is the most probable one (see `losses.cross_entropy`).

        `targets` are the codes without hidden ones; None: `indices`. For the other arguments see `__call__`.
        """
        c = self.config
        hidden, table = self._head(self._features(indices, label, order), slice(None))
        targets = (indices if targets is None else targets).reshape(hidden.shape[:-1])
        levels = jax.vmap(functools.partial(cross_entropy, smoothing=smoothing, shard=c.blocks.shard), (2, 0, 0, 2), 2)
        nats, correct, first = 0.0, True, 0
        for size, digit in zip(c.vocabulary, jnp.unravel_index(targets, c.vocabulary), strict=True):
            columns = slice(first, first + size)
            more, same = levels(hidden, table[:, columns], self.code_bias[:, columns], digit)
            nats, correct, first = nats + more, correct & same, first + size
        return nats.reshape(indices.shape), correct.reshape(indices.shape)

    def start(self, label: Label) -> Cache:
        """Returns the cache of a causal generator before the first code; unconditional generators ignore `label`."""
        c, b = self.config, self.config.blocks
        prefix, stacked = self._prefix(label), self.blocks.variables["params"]
        shape, size = (len(label), b.heads), (b.width // b.heads, prefix.shape[1] + c.length)
        blocks = [(jnp.zeros(shape + size, b.dtype), jnp.zeros(shape + size[::-1], b.dtype))] * b.depth
        # A loop over codes would copy slices of the stacked parameters in every step.
        params = [jax.tree.map(lambda p, i=i: p[i], stacked) for i in range(b.depth)]
        cache = (params, blocks, self._modulation(label))
        return self._decode(cache, prefix, 0, None)[1] if prefix.shape[1] else cache

    def step(self, cache: Cache, previous: Label, code: Int[Array, ""]) -> tuple[Float[Array, "B F"], Cache]:
        """Returns the logits of the code number `code` in [0, T), given the code before: K before the first one."""
        c = self.config
        x, rope = self._inputs(previous[:, None], (code[None] - 1) % c.length, code[None])
        x, cache = self._decode(cache, x, code + cache[1][0][0].shape[-1] - c.length, rope)
        return self._logits(self._finish(x)[:, None], code[None] % c.levels)[:, 0, 0], cache

    def _decode(self, cache: Cache, x: vit.Tokens, first: Any, rope: vit.Rope | None) -> tuple[vit.Tokens, Cache]:
        """Runs the blocks on the tokens `first` and following, given the cache of those before."""
        (params, blocks, modulation), block = cache, vit.Block(self.config.blocks, parent=None)
        blocks = list(blocks)
        for i, variables in enumerate(params):
            rows = None if modulation is None else modulation[i]
            x, blocks[i] = block.apply({"params": variables}, x, rope, rows, blocks[i], first)
        return x, (params, blocks, modulation)

    def _features(self, indices: Codes, label: Label | None, order: Order | None) -> Float[Array, "B N L D"]:
        """Returns what the head multiplies with its table, for every code."""
        c, b, rows = self.config, self.config.blocks, len(indices)
        if indices.shape[1:] != (c.length,):
            raise ValueError(f"indices have shape {indices.shape}, expected [B, {c.length}]: flatten grids and levels")
        label = jnp.full(rows, c.classes) if label is None else label
        own = target = jnp.arange(c.length)
        if order is not None:
            own = target = (order[..., None] * c.levels + jnp.arange(c.levels)).reshape(rows, -1)
            indices = jnp.take_along_axis(indices, target, axis=1)
        if b.causal:
            own = jnp.roll(target, 1, axis=-1)
            indices = jnp.roll(indices, 1, axis=1).at[:, 0].set(c.num_embeddings)
        (x, rope), prefix = self._inputs(indices, own, target), self._prefix(label)
        x = jnp.concatenate([prefix, x], axis=1)
        x, _ = vit.run_blocks(b, x, rope, modulation=self._modulation(label), block=self.blocks)
        x = self._finish(x[:, prefix.shape[1] :])
        if order is not None:
            x = jnp.take_along_axis(x, jnp.argsort(target)[..., None], axis=1)
        return x.reshape(rows, c.positions, c.levels, -1)

    def _inputs(
        self, indices: Codes, own: Int[Array, "*b T"], target: Int[Array, "*b T"]
    ) -> tuple[vit.Tokens, vit.Rope | None]:
        """Returns embedded codes and their rotation; `own` are their numbers, `target` those of the predicted codes."""
        c, b = self.config, self.config.blocks
        level, position = own % c.levels, own // c.levels
        codes = jnp.minimum(indices, c.num_embeddings - 1)
        if c.code_channels:
            vectors = self.code_vectors.value[level, codes]
            # Zeros for the other levels make it one product with the projections of all levels.
            vectors = jax.nn.one_hot(level, c.levels)[..., None] * vectors[..., None, :]
            x = jnp.tensordot(vectors, self.code_proj, 2, precision=jax.lax.Precision.HIGHEST)
        else:
            digits, first = jnp.unravel_index(codes, c.vocabulary), np.cumsum((0, *c.vocabulary[:-1]))
            x = sum(self.code_embed[level, digit + i] for digit, i in zip(digits, first, strict=True))
        x = jnp.where((indices < c.num_embeddings)[..., None], x, self.hidden_embed) + self.level_embed[level]
        grid = jnp.asarray(np.repeat(np.arange(len(c.grids)), [h * w for h, w in c.grids]))
        x += self.pos_embed[position if c.pos == "learned" else grid[position]]
        if b.causal:
            x += self.target_embed[target // c.levels]
        rope = None
        if c.pos == "rope":
            grids = (vit.rope_table(h, w, b.width // b.heads, c.rope_theta) for h, w in c.grids)
            tables = [jnp.concatenate(parts) for parts in zip(*grids, strict=True)]
            rope = tuple(table[code // c.levels] for code in (target, own) for table in tables)
        return self.norm_embed(x.astype(b.dtype)), rope

    def _prefix(self, label: Label) -> Float[Array, "B P D"]:
        """Returns the class token and registers."""
        c, b = self.config, self.config.blocks
        tokens = [self.class_embed[label][:, None]] if c.classes and c.class_token else []
        registers = self.registers if c.registers else jnp.zeros((1, 0, b.width))
        tokens.append(jnp.broadcast_to(registers, (len(label), *registers.shape[1:])))
        return self.norm_embed(jnp.concatenate(tokens, axis=1).astype(b.dtype))

    def _modulation(self, label: Label) -> Float[Array, "L B 6 D"] | None:
        if not (self.config.adaln and self.config.classes):
            return None
        return self.modulation(nn.silu(self.norm_class(self.class_embed[label]))).swapaxes(0, 1)

    def _finish(self, x: vit.Tokens) -> vit.Tokens:
        return self.norm_head(ACTIVATIONS[self.config.blocks.act](self.head(self.norm(x))))

    def _head(self, x: Float[Array, "B N L D"], level: Any) -> tuple[Float[Array, "B N L C"], Float[Array, "L F C"]]:
        """Returns the vectors and the table whose products, plus a bias, are the logits."""
        c = self.config
        if not c.tied or not c.code_channels:
            return x, (self.code_embed if c.tied else self.head_embed)[level]
        projection, precision = self.code_proj[level].astype(x.dtype), vit.matmul_precision(c.blocks.dtype)
        return jnp.einsum("bnld,lcd->bnlc", x, projection, precision=precision), self.code_vectors.value[level]

    def _logits(self, x: Float[Array, "B N L D"], level: Any) -> Float[Array, "B N L F"]:
        (hidden, table), b = self._head(x, level), self.config.blocks
        products = {"precision": vit.matmul_precision(b.dtype), "preferred_element_type": jnp.float32}
        return b.shard(jnp.einsum("bnlc,lfc->bnlf", hidden, table.astype(b.dtype), **products) + self.code_bias[level])
