"""The registry of quantizers: their names and settings, and how each is built from a config.

The file of a quantizer annotates its settings and calls `register`. The config schema, the factory, the hash of a
tokenizer, the sharding table, the documentation and the law tests read the registry.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from vqrae_jax.quantizers.base import Quantizer
from vqrae_jax.quantizers.estimators import Estimator
from vqrae_jax.quantizers.nearest import Distance


@dataclasses.dataclass(frozen=True)
class Setting:
    """Metadata that makes an annotated field of a dataclass a setting of the config.

    Attributes:
      doc: one line for the schema and the documentation.
      path: the config field, relative to `model`; by default quantizer_params.NAME. Fields of `model` itself keep the
        type and default of the schema.
      ge, gt, le: the accepted range.
      default: of the config, by default that of the dataclass; None: an unset field, for which the dataclass decides.
      hashed: it changes the meaning of indices and is therefore part of the hash of a tokenizer.
    """

    doc: str = ""
    path: str = ""
    ge: int | None = None
    gt: int | None = None
    le: int | None = None
    default: Any = ...
    hashed: bool = False


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
        "quantizer_params.codebook_dim", ge=1, default=None, hashed=True,
    ),
]  # fmt: skip
Inner = Annotated[str, Setting("the quantizer that residual, product and multiscale are composed of", hashed=True)]


class Context(NamedTuple):
    """The latents that a quantizer is built for."""

    channels: int
    grid: int  # side of the latent grid
    flat: bool  # latents are rows [B, N, C] instead of grids
    build_inner: Callable[[int, int], Quantizer]  # (channels, calls per step) -> the quantizer that `inner` names
    calls: int = 1  # of the quantizer in one training step
    is_inner: bool = False  # it is built for a residual, product or multiscale quantizer


class Entry(NamedTuple):
    """One registered quantizer; see `register`."""

    settings: type[Any]
    paper: str
    purpose: str
    build: Callable[..., Quantizer] | None
    codebook: Mapping[str, str]
    inner: bool
    wrappers: tuple[str, ...]


class Field(NamedTuple):
    """One setting of one quantizer: the field of its dataclass."""

    setting: Setting
    annotation: Any
    default: Any


QUANTIZERS: dict[str, Entry] = {}
# Modules around a quantizer by the config field of their `dim`, which is None without the wrapper; outer ones first.
WRAPPERS: dict[str, type[Any]] = {}


def register(
    name: str,
    settings: type[Any],
    paper: str,
    purpose: str,
    *,
    build: Callable[..., Quantizer] | None = None,
    codebook: Mapping[str, str] | None = None,
    inner: bool = False,
    wrappers: tuple[str, ...] = ("whitening_dim", "codebook_dim"),
) -> None:
    """Adds a quantizer under `name`, a value of `model.quantizer`.

    Args:
      settings: a dataclass whose fields with a `Setting` are read from the config; the module itself without `build`.
      paper: authors, year and identifier.
      purpose: what the quantizer is good for, in one line of the documentation.
      build: (context, **settings) -> module; raises ConfigError with the name of the dataclass field.
      codebook: axes of the variables with one entry per embedding, for example {"codebook": "K C"}; a mesh splits K.
      inner: residual, product and multiscale quantizers can be composed of it.
      wrappers: the WRAPPERS that it supports.
    """
    QUANTIZERS[name] = Entry(settings, paper, purpose, build, codebook or {}, inner, wrappers)


def settings_of(dataclass: type[Any]) -> dict[str, Field]:
    """Returns the settings of a dataclass by the names of its fields, with their paths filled in."""
    result = {}
    for field in dataclasses.fields(dataclass):
        for setting in getattr(field.type, "__metadata__", ()):
            setting = dataclasses.replace(setting, path=setting.path or f"quantizer_params.{field.name}")
            default = field.default if setting.default is ... else setting.default
            result[field.name] = Field(setting, field.type, default)
    return result


def all_settings() -> dict[str, Field]:
    """Returns the settings of all quantizers and wrappers by their path.

    Raises:
      TypeError: two quantizers declare different types or defaults for one path in quantizer_params.
    """
    result: dict[str, Field] = {}
    for dataclass in (*WRAPPERS.values(), *(entry.settings for entry in QUANTIZERS.values())):
        for field in settings_of(dataclass).values():
            path = field.setting.path
            if path.startswith("quantizer_params.") and result.setdefault(path, field)[1:] != field[1:]:
                raise TypeError(f"{dataclass.__name__} declares {path} differently from another quantizer")
            result[path] = field
    return result


def codebook_axes() -> dict[str, str]:
    """Returns the axes of all variables with one entry per embedding, by the end of their path."""
    return {name: axes for entry in QUANTIZERS.values() for name, axes in entry.codebook.items()}
