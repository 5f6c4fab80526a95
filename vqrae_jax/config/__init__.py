"""Configs of runs: the schema, config files, flags and JSON."""

from vqrae_jax.config.epochs import epochs_to_steps, prefer_command_line_steps
from vqrae_jax.config.load import (
    check_field,
    defaults,
    from_dict,
    from_json,
    from_saved,
    load_config_file,
    parse_decoder_and_size,
    to_json,
)
from vqrae_jax.config.schema import (
    AdamWConfig,
    AdversaryConfig,
    Config,
    DataConfig,
    EncoderClass,
    EncoderParams,
    EvaluationConfig,
    GeneratorConfig,
    ImageSource,
    LossConfig,
    MeshConfig,
    Metric,
    ModelConfig,
    OptimizerConfig,
    Part,
    PerceptualConfig,
    QuantizerParams,
    Sampler,
    Section,
    TrainConfig,
)
