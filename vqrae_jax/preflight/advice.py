"""Sentences about settings with which a run wastes the chips: the dtype, and too few images per device."""

from vqrae_jax.config import Config
from vqrae_jax.preflight.chips import Topology
from vqrae_jax.preflight.programs import Cost

FIXED_SHARE = 0.25  # of a step for weights and gradients: above, more images per device are faster per image
DTYPES = ("model.dtype", "loss.perceptual.dtype", "adversary.dtype")


def float32_fields(config: Config) -> list[str]:
    """Returns the dtype fields whose networks run in float32."""
    if config.train.task == "generator":
        return ["generator.dtype"] if config.generator.dtype == "float32" else []
    used = (True, config.loss.perceptual.weight > 0, config.adversary.discriminator != "none")
    dtypes = (config.model.dtype, config.loss.perceptual.dtype, config.adversary.dtype)
    return [name for name, use, dtype in zip(DTYPES, used, dtypes, strict=True) if use and dtype == "float32"]


def in_bfloat16(config: Config) -> Config:
    """Returns the config with all networks in bfloat16, as `config.recipes.half_precision` sets it."""
    update = {"dtype": "bfloat16"}
    if config.train.task == "generator":
        return config.model_copy(update={"generator": config.generator.model_copy(update=update)})
    loss = config.loss.model_copy(update={"perceptual": config.loss.perceptual.model_copy(update=update)})
    model, adversary = (section.model_copy(update=update) for section in (config.model, config.adversary))
    return config.model_copy(update={"model": model, "loss": loss, "adversary": adversary})


def describe_float32(config: Config, topology: Topology) -> str:
    """Returns a warning about float32 products; "" if the networks run in bfloat16 or the rates are unknown."""
    fields = float32_fields(config)
    if not (fields and topology.chip):
        return ""
    passes, remedy = topology.chip.passes["highest"], " ".join(f"--config.{name}=bfloat16" for name in fields)
    return (
        f"{' and '.join(fields)} = float32: on {topology.kind} a float32 product takes as long as {passes:.0f} in "
        f"bfloat16; {remedy} is faster"
    )


def describe_images(train: Cost, topology: Topology) -> str:
    """Returns a warning if weights and gradients, which cost the same for any batch, take much of a step; or ""."""
    if train.roofline is None:
        return ""
    bounds, memory, images = train.roofline, train.memory, train.images / topology.size
    fixed = bounds.network
    if bounds.memory > bounds.compute:
        fixed += 2 * memory.arguments / topology.chip.bandwidth  # the state is read and written once
    if fixed < FIXED_SHARE * bounds.slowest:
        return ""
    # Temporaries that do not grow with the batch make this a lower bound.
    room = (topology.memory - memory.arguments - memory.code) / (memory.temporaries + memory.outputs)
    remedy = "use fewer devices"
    if room >= 2:
        batch = train.images << (int(room).bit_length() - 1)
        remedy = f"memory has room for --config.data.batch_size={batch}; otherwise {remedy}"
    return (
        f"{images:g} images per device: weights and gradients, whose traffic is the same for any batch, take "
        f"{fixed / bounds.slowest:.0%} of a step; {remedy}"
    )
