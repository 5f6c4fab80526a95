"""Builds a quantizer from the model section of a config."""

from typing import Any

from vqrae_jax.errors import ConfigError
from vqrae_jax.quantizers.base import Quantizer
from vqrae_jax.quantizers.registry import QUANTIZERS, WRAPPERS, Context, all_settings, settings_of

# The model section of a config: any object with its fields, `quantizer_params` among them.
Model = Any


def create(model: Model, channels: int, grid: int) -> Quantizer:
    """Builds the quantizer that `model.quantizer` names, for latents of `channels` on a grid of side `grid`.

    Raises:
      ConfigError: a setting does not fit this quantizer or these latents.
    """
    params = vars(model.quantizer_params)

    def build(name: str, channels: int, calls: int) -> Quantizer:
        entry = QUANTIZERS[name]
        values = {name: _value(model, setting.path) for name, setting in settings_of(entry.module).items()}
        values = {name: value for name, value in values.items() if value is not None}  # None: the quantizer's default
        context = Context(channels, grid, model.quantize_before_reshape, params["codebook_dim"], calls, build)
        return entry.build(context, **values)

    names = [name for name in QUANTIZERS[model.quantizer].wrappers if params[name] is not None]
    widths = [channels, *(params[name] for name in names)]
    try:
        quantizer = build(model.quantizer, widths[-1], 1)
        for name, outside in reversed(list(zip(names, widths[:-1], strict=True))):
            quantizer = WRAPPERS[name][0](quantizer, outside)
    except ConfigError as error:
        raise error.renamed({path.rpartition(".")[2]: f"model.{path}" for path in all_settings()}) from None
    return quantizer


def unread(model: Model, channels: int, grid: int) -> list[str]:
    """Returns the fields that differ from their defaults although the quantizer is the same with the defaults."""
    quantizer = create(model, channels, grid)
    result = []
    for path in sorted(all_settings(), key=lambda path: "." in path):
        section, _, name = path.rpartition(".")
        target = model.quantizer_params if section else model
        default = type(target).model_fields[name].default
        if _value(model, path) != default:
            changed = target.model_copy(update={name: default})
            try:
                other = create(model.model_copy(update={section: changed}) if section else changed, channels, grid)
                if other == quantizer:
                    result.append(path)
            except ConfigError:
                pass  # the quantizer reads it: the default does not fit
    return result


def unread_paths(model: Model) -> set[str]:
    """Returns the settings of quantizers that the quantizer of a model does not read, whatever their values."""
    paths = {name: {s.path for s in settings_of(entry.module).values()} for name, entry in QUANTIZERS.items()}
    read = paths[model.quantizer]
    if "quantizer_params.inner" in read:
        read |= paths[model.quantizer_params.inner]
    return set().union(*paths.values()) - read


def _value(model: Model, path: str) -> Any:
    section, _, name = path.rpartition(".")
    return vars(model.quantizer_params if section else model)[name]
