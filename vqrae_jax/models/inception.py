"""Inception-v3 (Szegedy et al. 2015, arXiv:1512.00567) of 2015-12-05, as the Frechet inception distance uses it.

It differs from the Inception-v3 of classifier libraries: 1,008 classes, average pooling without the padding, and max
pooling in the last block.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vqrae_jax.resize import resize

SIDE = 299  # pixels
FEATURES, CLASSES = 2048, 1008

Map = Float[Array, "B _ _ _"]  # height, width, channels


class ConvNorm(nn.Module):
    """Convolution, normalization by fixed statistics, ReLU; `window` is one side, or (rows, columns)."""

    features: int
    window: int | tuple[int, int] = 1
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Map) -> Map:
        window = (self.window, self.window) if isinstance(self.window, int) else self.window
        x = nn.Conv(
            self.features, window, self.stride, self.padding, use_bias=False, precision=jax.lax.Precision.HIGHEST,
            name="conv",
        )(x)  # fmt: skip
        return nn.relu(FixedNorm(name="norm")(x))


class FixedNorm(nn.Module):
    """Batch normalization with fixed statistics, which are parameters."""

    eps: float = 1e-3

    @nn.compact
    def __call__(self, x: Map) -> Map:
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        initial = {"mean": zeros, "var": ones, "scale": ones, "bias": zeros}
        value = {name: self.param(name, init, x.shape[-1:]) for name, init in initial.items()}
        return (x - value["mean"]) * (value["scale"] / jnp.sqrt(value["var"] + self.eps)) + value["bias"]


class BlockA(nn.Module):
    """Branches at 35 x 35: 1 x 1, 5 x 5, two 3 x 3, average pooling."""

    pooled: int

    @nn.compact
    def __call__(self, x: Map) -> Map:
        return _concatenate(
            ConvNorm(64, name="branch1x1")(x),
            _chain(x, branch5x5_1=(48, 1), branch5x5_2=(64, 5)),
            _chain(x, branch3x3dbl_1=(64, 1), branch3x3dbl_2=(96, 3), branch3x3dbl_3=(96, 3)),
            ConvNorm(self.pooled, name="branch_pool")(_average(x)),
        )


class BlockB(nn.Module):
    """Reduction from 35 x 35 to 17 x 17."""

    @nn.compact
    def __call__(self, x: Map) -> Map:
        twice = _chain(x, branch3x3dbl_1=(64, 1), branch3x3dbl_2=(96, 3))
        return _concatenate(_halve(384, "branch3x3")(x), _halve(96, "branch3x3dbl_3")(twice), _halve_max(x))


class BlockC(nn.Module):
    """Branches at 17 x 17: 1 x 1, one and two factorized 7 x 7, average pooling."""

    inner: int

    @nn.compact
    def __call__(self, x: Map) -> Map:
        c = self.inner
        once = _chain(x, branch7x7_1=(c, 1), branch7x7_2=(c, (1, 7)), branch7x7_3=(192, (7, 1)))
        twice = _chain(
            x, branch7x7dbl_1=(c, 1), branch7x7dbl_2=(c, (7, 1)), branch7x7dbl_3=(c, (1, 7)),
            branch7x7dbl_4=(c, (7, 1)), branch7x7dbl_5=(192, (1, 7)),
        )  # fmt: skip
        pooled = ConvNorm(192, name="branch_pool")(_average(x))
        return _concatenate(ConvNorm(192, name="branch1x1")(x), once, twice, pooled)


class BlockD(nn.Module):
    """Reduction from 17 x 17 to 8 x 8."""

    @nn.compact
    def __call__(self, x: Map) -> Map:
        small = _halve(320, "branch3x3_2")(ConvNorm(192, name="branch3x3_1")(x))
        large = _chain(x, branch7x7x3_1=(192, 1), branch7x7x3_2=(192, (1, 7)), branch7x7x3_3=(192, (7, 1)))
        return _concatenate(small, _halve(192, "branch7x7x3_4")(large), _halve_max(x))


class BlockE(nn.Module):
    """Branches at 8 x 8 with parallel rows and columns; the last block of the network uses max pooling."""

    last: bool

    @nn.compact
    def __call__(self, x: Map) -> Map:
        once = ConvNorm(384, name="branch3x3_1")(x)
        twice = _chain(x, branch3x3dbl_1=(448, 1), branch3x3dbl_2=(384, 3))
        pooled = nn.max_pool(x, (3, 3), padding="SAME") if self.last else _average(x)
        return _concatenate(
            ConvNorm(320, name="branch1x1")(x),
            ConvNorm(384, (1, 3), name="branch3x3_2a")(once),
            ConvNorm(384, (3, 1), name="branch3x3_2b")(once),
            ConvNorm(384, (1, 3), name="branch3x3dbl_3a")(twice),
            ConvNorm(384, (3, 1), name="branch3x3dbl_3b")(twice),
            ConvNorm(192, name="branch_pool")(pooled),
        )


class Inception(nn.Module):
    """The network from images to features, class scores and spatial features."""

    @nn.compact
    def __call__(
        self, image: Float[Array, "B H W 3"]
    ) -> tuple[Float[Array, "B 2048"], Float[Array, "B 1008"], Float[Array, "B 2023"]]:
        """Returns the features before the last layer, its scores without bias (for the Inception score), and spatial.

        The spatial features [17 x 17 x 7] are those of sFID (Nash et al. 2021, arXiv:2103.03841): the first channels of
        "mixed_6/conv:0" in the TensorFlow graph, the 1 x 1 branch of Mixed_6d.

        Args:
          image: in [0, 1], of any size; resized to 299 as in TensorFlow 1 (no half-pixel centres, no antialiasing).
        """
        x = 2 * resize(255 * image, SIDE, SIDE, "bilinear_tf1") / 256 - 1  # (bytes - 128) / 128
        x = ConvNorm(32, 3, 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = ConvNorm(32, 3, 1, "VALID", name="Conv2d_2a_3x3")(x)
        x = ConvNorm(64, 3, name="Conv2d_2b_3x3")(x)
        x = _halve_max(x)
        x = ConvNorm(80, name="Conv2d_3b_1x1")(x)
        x = ConvNorm(192, 3, 1, "VALID", name="Conv2d_4a_3x3")(x)
        x = _halve_max(x)
        for name, pooled in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = BlockA(pooled, name=name)(x)
        x = BlockB(name="Mixed_6a")(x)
        for name, inner in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            x = BlockC(inner, name=name)(x)
            if name == "Mixed_6d":  # its first channels are those of the 1 x 1 branch
                spatial = x[..., :7].reshape(len(x), -1)
        x = BlockD(name="Mixed_7a")(x)
        x = BlockE(last=False, name="Mixed_7b")(x)
        features = BlockE(last=True, name="Mixed_7c")(x).mean((1, 2))
        head = nn.Dense(CLASSES, precision=jax.lax.Precision.HIGHEST, name="fc")
        return features, head(features) - head.variables["params"]["bias"], spatial


def _chain(x: Map, **layers: tuple[int, int | tuple[int, int]]) -> Map:
    """Applies convolutions in sequence: name = (features, window)."""
    for name, (features, window) in layers.items():
        x = ConvNorm(features, window, name=name)(x)
    return x


def _halve(features: int, name: str) -> ConvNorm:
    return ConvNorm(features, 3, 2, "VALID", name=name)


def _halve_max(x: Map) -> Map:
    return nn.max_pool(x, (3, 3), strides=(2, 2))


_average = functools.partial(nn.avg_pool, window_shape=(3, 3), padding="SAME", count_include_pad=False)


def _concatenate(*branches: Map) -> Map:
    return jnp.concatenate(branches, axis=-1)
