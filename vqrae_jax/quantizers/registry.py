"""The registry of quantizers: their names and settings, and how each is built from a config.

The config schema, the factory, the hash of a tokenizer, the sharding table and the law tests read it.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

from vqrae_jax.quantizers.base import Quantizer
from vqrae_jax.quantizers.estimators import Estimator
from vqrae_jax.quantizers.kmeans import CodebookInit
from vqrae_jax.quantizers.nearest import Distance


@dataclasses.dataclass(frozen=True)
class Setting:
    """Metadata of a field of a module: its documentation, and the field of the config that sets it."""

    doc: str = ""  # one line for the schema and the documentation
    # The config field, relative to `model`; fields of `model` itself keep the type and default of the schema. "": the
    # config does not have this field of the module.
    path: str = "quantizer_params.NAME"
    ge: int | None = None  # the accepted range
    gt: int | None = None
    le: int | None = None
    default: Any = ...  # of the config, if it is not that of the field; None: unset, and the field's default applies
    hashed: bool = False  # it changes the meaning of indices and is therefore part of the hash of a tokenizer
    annotation: Any = None  # filled in by `settings_of`


# Fields of several modules, with one type, default and meaning.
Channels = Annotated[int, Setting("channels C of the latents", "")]
Inside = Annotated[Quantizer, Setting("quantizer of the latents inside; its channels are theirs", "")]
InitSetting = Annotated[
    CodebookInit,
    Setting("initial codebook: k-means of the first batch, random latents of it, or random numbers", "NAME"),
]
NumEmbeddings = Annotated[
    int,
    Setting(
        "codebook size K, of each level or group, usually 1,024 to 65,536; a power of two for lfq and bsq",
        "NAME", hashed=True,
    ),
]  # fmt: skip
CommitmentCost = Annotated[
    float, Setting("weight of the squared distance from latents to their embeddings, usually 0.25 to 1", "NAME")
]
DistanceSetting = Annotated[
    Distance,
    Setting(
        "distance of the search: l2, cosine (unit lengths), angle (cosine, but embeddings keep their length) or dot "
        "(ibq); None: cosine for simvq, l2 otherwise",
        default=None, hashed=True,
    ),
]  # fmt: skip
EstimatorSetting = Annotated[
    Estimator,
    Setting(
        "gradient of the choice of an embedding: that of the identity, rotated with the embedding, or shared with the "
        "embedding (DiVeQ)"
    ),
]
Frozen = Annotated[bool, Setting("keep the codebook as it is after its initialization")]
Temperature = Annotated[
    float, Setting("temperature of the soft assignments or of the softmax over embeddings, usually 0.01 to 1", gt=0)
]
DiversityCost = Annotated[
    float, Setting("weight of log K minus the entropy of the mean soft assignment, usually 0 to 0.1", ge=0)
]
EntropyCost = Annotated[
    float,
    Setting(
        "weight of the entropies that make assignments certain and use even, usually 0.05 to 0.1", ge=0, default=0.1
    ),
]
OrthogonalityCost = Annotated[
    float, Setting("weight of the mean squared cosine between embeddings, usually 0 to 10", ge=0)
]
CodebookDim = Annotated[
    int,
    Setting(
        "channels of the embeddings, usually 8 to 64, behind learned linear maps; None: those of the latents, for lfq "
        "and bsq log2 num_embeddings", ge=1, le=65_536, default=None, hashed=True,
    ),
]  # fmt: skip
WhiteningDim = Annotated[
    int,
    Setting(
        "number of principal axes of the latents that are used, scaled to variance one, usually 16 to 64; from "
        "normalization_stat_path or the first batch; None: no whitening", ge=1, le=65_536, default=None, hashed=True,
    ),
]  # fmt: skip
Inner = Annotated[
    Quantizer,
    Setting(
        "quantizer of each level, group or scale, with the settings of its own", "quantizer_params.inner",
        default="ema", hashed=True,
    ),
]  # fmt: skip


class Context(NamedTuple):
    """The latents that a quantizer is built for."""

    channels: int
    grid: int  # side of the latent grid
    flat: bool  # latents are rows [B, N, C] instead of grids
    codebook_dim: int | None  # if it is set, it has already changed `channels`
    calls: int  # of the quantizer in one training step
    build: Callable[[str, int, int], Quantizer]  # (name, channels, calls) -> the quantizer of that name


class Entry(NamedTuple):
    """One registered quantizer."""

    module: type[Quantizer]
    # (context, **settings of the module) -> module; raises ConfigError with the name of the setting.
    build: Callable[..., Quantizer]
    paper: str  # authors, year and identifier
    purpose: str  # one line of the documentation
    codebook: Mapping[str, str]  # axes of the variables with one entry per embedding; a mesh splits K
    inner: bool  # residual, product and multiscale quantizers can be composed of it
    wrappers: tuple[str, ...]  # the WRAPPERS that it supports


QUANTIZERS: dict[str, Entry] = {}
# (module around a quantizer, setting) by the config field of the channels inside, None without it; outer ones first.
WRAPPERS: dict[str, tuple[type[Any], Any]] = {}


def register(
    name: str, module: type[Quantizer], paper: str, purpose: str, *, build: Callable[..., Quantizer] | None = None,
    codebook: Mapping[str, str] | None = None, inner: bool = False,
    wrappers: tuple[str, ...] = ("whitening_dim", "codebook_dim"),
) -> None:  # fmt: skip
    """Adds an `Entry` under `name`, a value of `model.quantizer`."""
    build = build or (lambda context, **settings: module(channels=context.channels, **settings))
    QUANTIZERS[name] = Entry(module, build, paper, purpose, codebook or {}, inner, wrappers)


def settings_of(module: type[Quantizer]) -> dict[str, Setting]:
    """Returns the fields of a module that the config sets, by name."""
    parameters = inspect.signature(module).parameters.items()
    fields = {name: _complete(name, parameter.annotation, parameter.default) for name, parameter in parameters}
    return {name: setting for name, setting in fields.items() if setting.path}


def all_settings() -> dict[str, Setting]:
    """Returns the settings of all quantizers and wrappers by their path."""
    wrappers = [_complete(name, annotation, None) for name, (_, annotation) in WRAPPERS.items()]
    result = {setting.path: setting for setting in wrappers}
    for entry in QUANTIZERS.values():
        for setting in settings_of(entry.module).values():
            path, other = setting.path, result.setdefault(setting.path, setting)
            same = (setting.annotation, setting.default) == (other.annotation, other.default)
            if path.startswith("quantizer_params.") and not same:
                raise TypeError(f"two quantizers declare {path} with different types or defaults")
            result[path] = setting
    return result


def codebook_axes() -> dict[str, str]:
    """Returns the axes of all variables with one entry per embedding, by the end of their path."""
    return {name: axes for entry in QUANTIZERS.values() for name, axes in entry.codebook.items()}


def _complete(name: str, annotation: Any, default: Any) -> Setting:
    """Returns the setting of a field with its path, default and annotation; without a path if the config has none."""
    setting = next(iter(getattr(annotation, "__metadata__", ())), Setting(path=""))
    default = default if setting.default is ... else setting.default
    return dataclasses.replace(setting, path=setting.path.replace("NAME", name), default=default, annotation=annotation)
