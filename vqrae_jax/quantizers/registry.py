"""The registry of quantizers: their names and settings, and how each is built from a config.

The config schema, the factory, the hash of a tokenizer, the sharding table and the law tests read it.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from vqrae_jax.quantizers.base import Quantizer
from vqrae_jax.quantizers.estimators import Estimator
from vqrae_jax.quantizers.nearest import Distance


@dataclasses.dataclass(frozen=True)
class Setting:
    """Metadata that makes a field of a module, or a parameter of a build function, a setting of the config."""

    doc: str = ""  # one line for the schema and the documentation
    # The config field, relative to `model`; fields of `model` itself keep the type and default of the schema.
    path: str = "quantizer_params.NAME"
    ge: int | None = None  # the accepted range
    gt: int | None = None
    le: int | None = None
    default: Any = ...  # of the config, if it is not that of the field; None: unset, and the field's default applies
    hashed: bool = False  # it changes the meaning of indices and is therefore part of the hash of a tokenizer
    annotation: Any = None  # filled in by `settings_of`


# Settings that several quantizers read, with one type, default and meaning.
StartSetting = Annotated[
    Literal["kmeans", "data", "normal"],
    Setting("initial codebook: k-means of the first batch, latents of it, or random numbers", "codebook_init"),
]
NumEmbeddings = Annotated[int, Setting("codebook size K", "num_embeddings", hashed=True)]
CommitmentCost = Annotated[float, Setting("weight of the pull of latents to their embeddings", "commitment_cost")]
DistanceSetting = Annotated[
    Distance,
    Setting("l2, cosine (directions only) or dot (ibq); None: cosine for simvq, else l2", default=None, hashed=True),
]
EstimatorSetting = Annotated[Estimator, Setting("gradient that a latent receives through the choice of its embedding")]
Temperature = Annotated[float, Setting("temperature of the soft assignments or of the softmax over embeddings", gt=0)]
DiversityCost = Annotated[
    float, Setting("weight of log K minus the entropy of the mean soft assignment of the batch", ge=0)
]
EntropyCost = Annotated[
    float, Setting("weight of the entropies that make assignments certain and use even", ge=0, default=0.1)
]
OrthogonalityCost = Annotated[float, Setting("weight of the mean squared cosine between embeddings", ge=0)]
CodebookDim = Annotated[
    int,
    Setting(
        "channels of the embeddings, by learned linear maps in and out; lfq, bsq: None or log2 num_embeddings",
        "quantizer_params.codebook_dim", ge=1, le=65_536, default=None, hashed=True,
    ),
]  # fmt: skip
Inner = Annotated[str, Setting("the quantizer that residual, product and multiscale are composed of", hashed=True)]


class Context(NamedTuple):
    """The latents that a quantizer is built for."""

    channels: int
    grid: int  # side of the latent grid
    flat: bool  # latents are rows [B, N, C] instead of grids
    build_inner: Callable[[int, int], Quantizer]  # (channels, calls per step) -> the quantizer that `inner` names
    calls: int  # of the quantizer in one training step


class Entry(NamedTuple):
    """One registered quantizer."""

    # The module, or (context, **settings) -> module, which raises ConfigError with the name of the parameter.
    build: Callable[..., Quantizer]
    paper: str  # authors, year and identifier
    purpose: str  # one line of the documentation
    codebook: Mapping[str, str]  # axes of the variables with one entry per embedding; a mesh splits K
    inner: bool  # residual, product and multiscale quantizers can be composed of it
    wrappers: tuple[str, ...]  # the WRAPPERS that it supports


QUANTIZERS: dict[str, Entry] = {}
# Modules around a quantizer by the config field of their `dim`, which is None without the wrapper; outer ones first.
WRAPPERS: dict[str, type[Any]] = {}


def register(
    name: str, build: Callable[..., Quantizer], paper: str, purpose: str, *, codebook: Mapping[str, str] | None = None,
    inner: bool = False, wrappers: tuple[str, ...] = ("whitening_dim", "codebook_dim"),
) -> None:  # fmt: skip
    """Adds an `Entry` under `name`, a value of `model.quantizer`."""
    QUANTIZERS[name] = Entry(build, paper, purpose, codebook or {}, inner, wrappers)


def settings_of(build: Callable[..., Quantizer]) -> dict[str, Setting]:
    """Returns the settings of a module or a build function by the names of its fields or parameters."""
    result = {}
    for name, parameter in inspect.signature(build).parameters.items():
        for setting in getattr(parameter.annotation, "__metadata__", ()):
            path, default = setting.path.replace("NAME", name), setting.default
            default = parameter.default if default is ... else default
            result[name] = dataclasses.replace(setting, path=path, default=default, annotation=parameter.annotation)
    return result


def all_settings() -> dict[str, Setting]:
    """Returns the settings of all quantizers and wrappers by their path."""
    result: dict[str, Setting] = {}
    for build in (*WRAPPERS.values(), *(entry.build for entry in QUANTIZERS.values())):
        for setting in settings_of(build).values():
            path, other = setting.path, result.setdefault(setting.path, setting)
            same = (setting.annotation, setting.default) == (other.annotation, other.default)
            if path.startswith("quantizer_params.") and not same:
                raise TypeError(f"two quantizers declare {path} with different types or defaults")
            result[path] = setting
    return result


def codebook_axes() -> dict[str, str]:
    """Returns the axes of all variables with one entry per embedding, by the end of their path."""
    return {name: axes for entry in QUANTIZERS.values() for name, axes in entry.codebook.items()}
