"""A quantizer by its name and settings."""

from collections.abc import Callable, Iterable
from typing import Any

from vqrae_jax.quantizers.base import MAX_CODES, Quantizer
from vqrae_jax.quantizers.ema import EMAQuantizer
from vqrae_jax.quantizers.fsq import FSQ
from vqrae_jax.quantizers.gumbel import GumbelQuantizer
from vqrae_jax.quantizers.ibq import IBQ
from vqrae_jax.quantizers.lfq import LFQ
from vqrae_jax.quantizers.multiscale import MultiScale
from vqrae_jax.quantizers.none import NoQuantizer
from vqrae_jax.quantizers.product import Product
from vqrae_jax.quantizers.projected import Projected
from vqrae_jax.quantizers.residual import Residual
from vqrae_jax.quantizers.simvq import SimVQ
from vqrae_jax.quantizers.whitened import Whitened

# Settings are the model section of a config: any object with its fields.
Settings = Any

# Fields beside quantizer_params that only some quantizers read.
TUNED = ("num_embeddings", "commitment_cost", "vq_decay", "vq_epsilon", "codebook_init", "revival_threshold")
MADE_OF_INNER = ("residual", "product", "multiscale")  # quantizers that quantizer_params.inner is for


def create(settings: Settings, channels: int, grid: int) -> Quantizer:
    """The quantizer that the settings describe.

    Args:
      settings: with `quantizer`, a name in QUANTIZERS, and the fields that it reads, in `quantizer_params` and beside.
      channels: C of the latents.
      grid: side of the latent grid.

    Raises:
      ValueError: names the field that does not fit.
    """
    params = settings.quantizer_params
    if settings.quantizer == "none":
        return NoQuantizer()
    searching = params.inner if settings.quantizer in MADE_OF_INNER else settings.quantizer
    if params.distance == "dot" and searching != "ibq":
        raise ValueError(f"quantizer_params.distance='dot': {searching!r} takes 'l2' or 'cosine'")
    if params.whitening_dim is None:
        return _projected(settings, channels, grid)
    if params.whitening_dim > channels:
        raise ValueError(f"quantizer_params.whitening_dim={params.whitening_dim}: the latent has {channels} channels")
    return Whitened(_projected(settings, params.whitening_dim, grid), channels, params.whitening_dim)


def unread(settings: Settings, channels: int, grid: int) -> list[str]:
    """The fields that are not at their defaults, and that `create` makes the same quantizer with and without."""
    params = settings.quantizer_params
    reset = {name: settings.model_copy(update={name: value}) for name, value in _defaults(settings, TUNED)}
    for name, value in _defaults(params, type(params).model_fields):
        changed = {"quantizer_params": params.model_copy(update={name: value})}
        reset[f"quantizer_params.{name}"] = settings.model_copy(update=changed)
    whole = create(settings, channels, grid)
    return [name for name, others in reset.items() if _makes(others, channels, grid, whole)]


def _defaults(section: Settings, names: Iterable[str]) -> list[tuple[str, Any]]:
    """Of the fields that have another value."""
    defaults = {name: type(section).model_fields[name].default for name in names}
    return [(name, value) for name, value in defaults.items() if getattr(section, name) != value]


def _makes(settings: Settings, channels: int, grid: int, wanted: Quantizer) -> bool:
    try:
        return create(settings, channels, grid) == wanted
    except ValueError:
        return False


def _projected(settings: Settings, channels: int, grid: int) -> Quantizer:
    width = settings.quantizer_params.codebook_dim
    if width is None or settings.quantizer == "fsq":
        return QUANTIZERS[settings.quantizer](settings, channels, grid)
    return Projected(QUANTIZERS[settings.quantizer](settings, width, grid), channels, width)


def _ema(settings: Settings, channels: int, grid: int) -> EMAQuantizer:
    params = settings.quantizer_params
    return EMAQuantizer(
        num_embeddings=settings.num_embeddings,
        channels=channels,
        commitment_cost=settings.commitment_cost,
        decay=settings.vq_decay,
        epsilon=settings.vq_epsilon,
        start=settings.codebook_init,
        revival_threshold=settings.revival_threshold,
        decay_warmup=params.decay_warmup,
        distance=params.distance or "l2",
        estimator=params.estimator,
        frozen=params.frozen,
        diversity_cost=params.diversity_cost,
        temperature=params.temperature,
    )


def _simvq(settings: Settings, channels: int, grid: int) -> SimVQ:
    params = settings.quantizer_params
    return SimVQ(
        settings.num_embeddings, channels, settings.commitment_cost, settings.codebook_init,
        params.distance or "cosine", params.input_projection, params.legacy, params.estimator,
        params.orthogonality_cost, params.diversity_cost, params.temperature,
    )  # fmt: skip


def _fsq(settings: Settings, channels: int, grid: int) -> FSQ:
    return FSQ(settings.quantizer_params.levels, channels, settings.quantizer_params.adapter)


def _lfq(settings: Settings, channels: int, grid: int) -> LFQ | Projected:
    params, bits = settings.quantizer_params, settings.num_embeddings.bit_length() - 1
    if 2**bits != settings.num_embeddings or not 1 < settings.num_embeddings <= MAX_CODES:
        raise ValueError(
            f"num_embeddings={settings.num_embeddings}: {settings.quantizer!r} needs a power of two, from 2 to "
            f"{MAX_CODES}"
        )
    if params.codebook_dim not in (None, bits):
        raise ValueError(
            f"quantizer_params.codebook_dim={params.codebook_dim}: {settings.quantizer!r} codes of num_embeddings="
            f"{settings.num_embeddings} have {bits} channels; leave it None"
        )
    inner = LFQ(
        bits, settings.commitment_cost, params.entropy_cost, params.diversity, params.temperature,
        spherical=settings.quantizer == "bsq",
    )  # fmt: skip
    return inner if channels == bits else Projected(inner, channels, bits)


def _gumbel(settings: Settings, channels: int, grid: int) -> GumbelQuantizer:
    params = settings.quantizer_params
    return GumbelQuantizer(
        settings.num_embeddings, channels, params.temperature, params.final_temperature, params.anneal_steps,
        orthogonality_cost=params.orthogonality_cost, start=settings.codebook_init,
    )  # fmt: skip


def _ibq(settings: Settings, channels: int, grid: int) -> IBQ:
    params = settings.quantizer_params
    return IBQ(
        settings.num_embeddings, channels, settings.commitment_cost, params.entropy_cost,
        temperature=params.temperature, orthogonality_cost=params.orthogonality_cost,
        start=settings.codebook_init, distance=params.distance or "l2",
    )  # fmt: skip


def _residual(settings: Settings, channels: int, grid: int) -> Residual:
    params = settings.quantizer_params
    if params.shared:
        levels = [_inner(settings, channels, grid, calls=params.depth)] * params.depth
    else:
        levels = [_inner(settings, channels, grid) for _ in range(params.depth)]
    return Residual(tuple(levels), channels, params.dropout)


def _product(settings: Settings, channels: int, grid: int) -> Product:
    params = settings.quantizer_params
    if channels % params.groups:
        raise ValueError(f"quantizer_params.groups={params.groups} does not divide the latent's {channels} channels")
    width = channels // params.groups
    return Product(tuple(_inner(settings, width, grid) for _ in range(params.groups)), channels)


def _multiscale(settings: Settings, channels: int, grid: int) -> MultiScale:
    if settings.quantize_before_reshape:
        raise ValueError(
            "quantize_before_reshape=True makes a row of the latent grid, which 'multiscale' shrinks and enlarges: "
            "set it to False"
        )
    grids = settings.quantizer_params.grids or _grids(grid)
    if grids[-1] != grid:
        raise ValueError(f"quantizer_params.grids={grids}: the last must be the side of the latent grid, {grid}")
    return MultiScale(_inner(settings, channels, grid, calls=len(grids)), channels, grids)


def _inner(settings: Settings, channels: int, grid: int, calls: int = 1) -> Quantizer:
    """What a quantizer is made of; `calls`: how often one training step calls it."""
    inner = QUANTIZERS[settings.quantizer_params.inner](settings, channels, grid)
    # It counts its calls, and the config speaks of steps.
    return inner.clone(anneal_steps=calls * inner.anneal_steps) if isinstance(inner, GumbelQuantizer) else inner


def _grids(side: int) -> tuple[int, ...]:
    """1, 2, 3, 4, 5, 6, 8, 10, 13, 16, as VAR has them, as far as they go."""
    return (*(g for g in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 24, 32) if g < side), side)


def _none(settings: Settings, channels: int, grid: int) -> NoQuantizer:
    return NoQuantizer()


QUANTIZERS: dict[str, Callable[[Settings, int, int], Quantizer]] = {
    "ema": _ema,
    "simvq": _simvq,
    "fsq": _fsq,
    "lfq": _lfq,
    "bsq": _lfq,
    "gumbel": _gumbel,
    "ibq": _ibq,
    "residual": _residual,
    "product": _product,
    "multiscale": _multiscale,
    "none": _none,
}
