"""The schema of a run: every field, its default, what it accepts, and the JSON form that is saved beside checkpoints.

The model section keeps the vocabulary and the defaults of the PyTorch VQRAE. A section is frozen once built; what a
single field accepts is in its type, what fields ask of each other is checked by the section that owns both.
"""

import difflib
import json
import typing
from typing import Annotated, Any, Literal

import ml_collections
import pydantic
from pydantic import Field

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ConfigError(ValueError):
    """A config that cannot run; the message names each field, what was given and what is accepted."""


class Section(pydantic.BaseModel):
    """A frozen group of fields that refuses names it does not know."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())


class EncoderParams(Section):
    """How the frozen encoder is read."""

    normalize: bool = True  # True: the final LayerNorm has no scale and bias, as in RAE; False: the pretrained affine
    layers: tuple[int, ...] = (-1,)  # blocks whose patch tokens are used; -1 is the last
    fusion: Literal["sum", "mean", "concat"] = "mean"  # how the chosen layers become one latent
    architecture: dict[str, Any] = {}  # fields of a hub config.json; only for an encoder without pretrained weights
    dinov2_path: str | None = None  # the origin's names for a weights source other than encoder_config_path
    dinov3_path: str | None = None
    model_name: str | None = None


class QuantizerParams(Section):
    """Fields of one or some quantizers; the names before the colon read them."""

    codebook_dim: Positive | None = None  # all but fsq, none: channels of the codes, by learned projections in and out
    whitening_dim: Positive | None = None  # all but none: principal axes of the latent that are kept, at variance one
    distance: Literal["l2", "cosine"] | None = None  # ema (None: l2), simvq (None: cosine)
    # ema, simvq: what gradient a latent receives through the choice of its code
    estimator: Literal["straight_through", "rotation", "distance_weighted"] = "straight_through"
    decay_warmup: bool = True  # ema: the decay of step t is t / (t + 1) until it reaches vq_decay
    frozen: bool = False  # ema: the codes never change
    input_projection: bool = True  # simvq: latents pass a learned linear map that nothing undoes
    legacy: bool = True  # simvq: commitment_cost weighs the codebook's term, as in the VQGAN release
    levels: tuple[Annotated[int, Field(ge=2)], ...] = (8, 5, 5, 5)  # fsq: values per quantized channel
    adapter: Literal["mlp", "linear", "none"] = "mlp"  # fsq: from the latent to the levels and back
    entropy_cost: NonNegative = 0.1  # lfq, bsq, ibq: certainty of each latent, diversity of the batch
    diversity: NonNegative = 1.0  # lfq, bsq: weight of the second
    orthogonality_cost: NonNegative = 0.0  # simvq, ibq, gumbel: mean squared cosine between codes
    temperature: Above0 = 1.0  # lfq, bsq, ibq, gumbel: of the soft codes
    final_temperature: Above0 = 0.1  # gumbel: after anneal_steps
    anneal_steps: Positive = 10_000  # gumbel
    inner: Literal["ema", "simvq", "lfq", "bsq", "gumbel", "ibq"] = "ema"  # residual, product, multiscale: made of
    depth: Positive = 4  # residual: levels
    shared: bool = False  # residual: one codebook for all levels
    dropout: Fraction = 0.0  # residual: share of images that train only a random prefix of the levels
    groups: Positive = 2  # product: groups of channels
    grids: tuple[Positive, ...] = ()  # multiscale: rising sides, the last that of the latent grid; (): as VAR


class ModelConfig(Section):
    """image -> encoder -> quantizer -> decoder -> image."""

    encoder_cls: Literal["Dinov2withNorm", "Dinov3withNorm", "SigLIP2wNorm", "MAEwNorm"] = "Dinov2withNorm"
    # Hub id or local folder with config.json, preprocessor_config.json and safetensors weights. None: nothing is
    # loaded, the encoder of `encoder_params.architecture` starts from random weights.
    encoder_config_path: str | None = "facebook/dinov2-base"
    encoder_params: EncoderParams = EncoderParams()
    encoder_input_size: Positive = 224  # pixels; images of another size are resized bicubically
    decoder_config_path: str = "vit_mae-base"  # ViT-S, ViT-B, ViT-L, ViT-XL, a folder or a hub id
    decoder_patch_size: Positive = 16  # pixels; the output is latent grid * decoder_patch_size
    decoder_train_pos_embed: bool = False  # the origin calls its table fixed and trains it; here fixed means fixed
    pretrained_decoder_path: str | None = None  # a decoder to start from
    noise_tau: NonNegative = 0.0  # latent noise in training: sigma = noise_tau * uniform(0, 1) per image
    reshape_to_2d: bool = True  # latents [B, h, w, C]; False: [B, N, C]
    normalization_stat_path: str | None = None  # .npz or .pt with mean and/or var of the latents
    # none: the continuous autoencoder RAE
    quantizer: Literal[
        "ema", "simvq", "fsq", "lfq", "bsq", "gumbel", "ibq", "residual", "product", "multiscale", "none"
    ] = "ema"
    quantizer_params: QuantizerParams = QuantizerParams()
    num_embeddings: Positive = 8192  # codebook size K
    commitment_cost: NonNegative = 0.25
    vq_decay: Decay = 0.99
    vq_epsilon: Above0 = 1e-5
    quantize_before_reshape: bool = False  # True: indices [B, N]; False: [B, h, w]
    # First codes: k-means of the first batch, tokens of the first batch, or N(0, 1) (the origin).
    codebook_init: Literal["kmeans", "data", "normal"] = "kmeans"
    revival_threshold: NonNegative = 0.2  # share of the mean EMA count below which a code is revived; 0: never
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters, distances and losses stay float32
    scan_layers: bool = False  # decoder blocks stacked and scanned: compile time independent of depth
    remat: bool = False  # recompute decoder blocks in the backward pass: less memory, about a third more FLOPs


class DataConfig(Section):
    """Where images come from and what a batch is."""

    source: Literal["photographs", "folder", "tfds"] = "folder"
    path: str | None = None  # folder: images, flat or in class subfolders; tfds: data_dir or prepared folder
    eval_path: str | None = None  # folder: validation images; none means no evaluation
    name: str | None = None  # tfds: the dataset's name, as in "imagenet2012"; not needed for a prepared folder
    train_split: str = "train"  # tfds split expressions
    eval_split: str = "validation"
    image_size: Positive = 256  # pixels, square
    crop: Literal["random", "center"] = "random"  # random: short side to image_size * resize, then a random square
    resize: Annotated[float, Field(ge=1)] = 1.0  # short side before a random crop, relative to image_size
    # Side of a random crop in source pixels, relative to image_size, drawn log-uniformly; (1, 1): see crop and resize.
    scale: tuple[Above0, Above0] = (1.0, 1.0)
    flip: bool = True  # mirror left-right with probability 1/2
    batch_size: Positive = 256  # images of one optimizer step, over all devices
    eval_batch_size: Positive = 256
    workers: Count = 0  # worker processes of grain; 0: threads in this process
    threads: Positive = 4

    @pydantic.model_validator(mode="after")
    def _scale_is_a_range(self):
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale={self.scale}: the first number may not exceed the second")
        return self


class LossConfig(Section):
    """Terms of the tokenizer's loss."""

    pixel: Literal["l1", "l2"] = "l1"
    pixel_weight: NonNegative = 1.0
    vq_weight: NonNegative = 1.0


class OptimizerConfig(Section):
    """AdamW and its schedule; steps are optimizer steps."""

    learning_rate: Above0 = 2e-4
    final_learning_rate: NonNegative = 2e-5
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Count = 0
    decay_end_steps: int | None = None  # None: train.steps
    b1: Decay = 0.9
    b2: Decay = 0.95
    weight_decay: NonNegative = 0.0  # on kernels only
    clip_norm: NonNegative = 0.0  # global gradient norm; 0 switches clipping off
    accumulate: Positive = 1  # micro-batches per optimizer step
    ema_decay: Decay = 0.9978  # of the parameters
    ema_warmup: bool = True  # the decay of step t is at most (1 + t) / (10 + t), so that short runs forget their start


class TrainConfig(Section):
    """The run."""

    steps: Positive = 100_000
    seed: Count = 0
    trainable: tuple[Literal["encoder", "quantizer", "decoder"], ...] = ("quantizer", "decoder")
    log_every: Positive = 50
    evaluate_every: Positive = 5_000
    checkpoint_every: Positive = 1_000
    keep_last: Positive = 3
    keep_best: Count = 1  # by validation PSNR
    keep_every: Count = 0  # steps; checkpoints of their multiples are kept for good; 0: none
    # Another run's workdir (or one of its checkpoints) whose model a new run starts from, its optimizer fresh.
    start_from: str | None = None
    start_parts: tuple[str, ...] = ()  # what is taken: paths like "decoder", "quantizer/codebook"; (): all of it
    start_renames: dict[str, str] = {}  # beginning of a path in that checkpoint -> what it is called here
    hang_seconds: NonNegative = 900  # without a step, after which every thread's stack is printed; 0: never
    pictures: Positive = 8  # validation images drawn at each evaluation
    wandb_project: str | None = None  # also log to Weights & Biases


class MeshConfig(Section):
    """How devices are laid out."""

    data: Annotated[int, Field(ge=-1)] = -1  # devices along "data"; -1: all that the others leave
    model: Positive = 1  # devices along "model": attention heads, mlp and codebook are split
    slices: Positive = 1  # TPU slices (or nodes) that only share batches; parameters are whole in each
    fsdp: bool = False  # split parameters, optimizer and EMA over "data" as well
    fsdp_min_size: Positive = 65_536  # elements below which a leaf is kept whole


class Config(Section):
    """All of it."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()

    @pydantic.model_validator(mode="after")
    def _batch_is_divisible(self):
        if self.data.batch_size % self.optimizer.accumulate:
            raise ValueError(
                f"data.batch_size={self.data.batch_size} is not divisible by "
                f"optimizer.accumulate={self.optimizer.accumulate}"
            )
        return self


SectionT = typing.TypeVar("SectionT", bound=Section)


def from_dict(schema: type[SectionT], values: dict[str, Any]) -> SectionT:
    """Builds `schema` from plain values.

    Raises:
      ConfigError: lists every unknown, missing or unacceptable field at once, with the nearest known name.
    """
    try:
        return schema.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(_explain(schema, e) for e in error.errors())) from None


def from_json(text: str, schema: type[SectionT] = Config) -> SectionT:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"the config is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"the config is a JSON {type(values).__name__}, expected an object")
    return from_dict(schema, values)


def to_json(config: Section) -> str:
    return config.model_dump_json(indent=2)


def defaults() -> ml_collections.ConfigDict:
    """Every default as the editable tree that config files change and flags override."""
    return _editable(Config())


def pairing(text: str) -> tuple[str, int]:
    """The argument of a config file, "decoder,pixels": `configs/dinov2_b.py:ViT-L,512` -> ("ViT-L", 512)."""
    decoder, _, pixels = text.partition(",")
    if not decoder or not pixels.isdigit() or int(pixels) % 16 or int(pixels) == 0:
        raise ConfigError(f"--config: {text!r} is no decoder and picture size, as in ViT-XL,256 (a multiple of 16)")
    return decoder, int(pixels)


def _editable(section: Section) -> ml_collections.ConfigDict:
    tree = ml_collections.ConfigDict(type_safe=False)  # types are checked against the schema, with better messages
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if value is None:  # a placeholder knows the type that a flag's text has to become
            value = ml_collections.config_dict.placeholder(int if int in typing.get_args(field.annotation) else str)
        tree[name] = _editable(value) if isinstance(value, Section) else value
    return tree


def check_field(schema: type[Section], path: str) -> None:
    """Raises ConfigError if `path` (as in "model.num_embeddings") names no field, with the nearest that does."""
    at: Any = schema
    parts = path.split(".")
    for i, part in enumerate(parts):
        if not (isinstance(at, type) and issubclass(at, Section)):
            return  # inside a free-form field
        if part not in at.model_fields:
            raise ConfigError(_unknown(at, parts[:i], part))
        at = at.model_fields[part].annotation


def _unknown(section: type[Section], path: list[str], name: str) -> str:
    known = list(section.model_fields)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {'.'.join([*path, near[0]])}?" if near else f"known here: {', '.join(known)}"
    return f"unknown config field {'.'.join([*path, name])}: {hint}"


def _explain(schema: type[Section], error: dict[str, Any]) -> str:
    path = [str(part) for part in error["loc"]]
    name = ".".join(path) or "config"
    if error["type"] == "extra_forbidden":
        return _unknown(_section_at(schema, path[:-1]), path[:-1], path[-1])
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{name}: {message}"
    return f"{name}={error['input']!r}: {message}"


def _section_at(schema: type[Section], path: list[str]) -> type[Section]:
    for part in path:
        schema = schema.model_fields[part].annotation
    return schema
