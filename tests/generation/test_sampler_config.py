import pytest

from vqrae_jax.errors import ConfigError
from vqrae_jax.generation.sampler_config import SamplerConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0), ("temperature", 0.0), ("temperature", float("nan")), ("last_temperature", -1.0),
        ("choice_temperature", -0.1), ("remasking", float("inf")), ("guidance", float("inf")), ("guidance", -1.0),
        ("guidance_power", 0.0), ("guidance_interval", (0.6, 0.4)), ("guidance_interval", (0.0, 1.1)),
    ],
)  # fmt: skip
def test_values_out_of_range_are_rejected(field, value):
    with pytest.raises(ConfigError) as caught:
        SamplerConfig(**{field: value})
    assert caught.value.field == field


@pytest.mark.parametrize("field", ["method", "schedule", "guidance_schedule"])
def test_unknown_names_are_rejected(field):
    config = SamplerConfig()
    object.__setattr__(config, field, "square")  # past the checks of annotations that only tests have
    with pytest.raises(ConfigError) as caught:
        config.__post_init__()
    assert caught.value.field == field
