"""The schema of a run: every field, its default and its range.

The model section keeps the names and the defaults of the PyTorch VQRAE. Sections are frozen. The type of a field is its
range; conditions between fields are checked by the section that contains them. Upper limits are far above sensible
values: a mistyped number is refused before it becomes memory, threads or an endless loop.
"""

import typing
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field
from pydantic_core import PydanticCustomError

from vqrae_jax.quantizers import registry

LARGEST_SIZE = 65_536  # of a network: channels, layers, pixels
MAX_STEPS = 10**9  # below the largest int32, in which the state counts
Positive = Annotated[int, Field(ge=1, le=MAX_STEPS)]
Count = Annotated[int, Field(ge=0, le=MAX_STEPS)]
Pixels = Annotated[int, Field(ge=1, le=16_384)]
Batch = Annotated[int, Field(ge=1, le=65_536)]
Few = Annotated[int, Field(ge=1, le=1024)]  # threads, channels, images of a page
Block = Annotated[int, Field(ge=-1024, le=1024)]  # index of a transformer block
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Above0 = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
Epochs = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] | None
Part = Literal["encoder", "quantizer", "decoder"]
EncoderClass = Literal["Dinov2withNorm", "Dinov3withNorm", "SigLIP2wNorm", "MAEwNorm"]


def invalid(field: str, value: Any, message: str) -> PydanticCustomError:
    """Returns the error of a condition between fields; `from_dict` reports it as section.field=value: message."""
    return PydanticCustomError("field_error", "{message}", {"field": field, "value": value, "message": message})


def _check_sizes(architecture: dict[str, Any]) -> dict[str, Any]:
    for name, value in architecture.items():
        if isinstance(value, int | float) and not abs(value) <= LARGEST_SIZE:
            raise ValueError(f"{name}={value} is not a number of at most {LARGEST_SIZE}")
    return architecture


# Fields of a hub config.json, for an encoder without pretrained weights.
Architecture = Annotated[dict[str, Any], pydantic.AfterValidator(_check_sizes)]


class Section(pydantic.BaseModel):
    """A frozen group of fields that rejects unknown names."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())


class EncoderParams(Section):
    """The features of the frozen encoder that are used."""

    normalize: bool = True  # final LayerNorm without scale and bias, as in RAE
    layers: tuple[Block, ...] = (-1,)  # blocks whose patch tokens are used; -1 is the last
    fusion: Literal["sum", "mean", "concat"] = "mean"  # how several layers become one latent
    architecture: Architecture = {}  # of an encoder without pretrained weights
    # Hub id or folder of the weights, if it is not encoder_config_path; the names are the PyTorch VQRAE's.
    dinov2_path: str | None = None
    dinov3_path: str | None = None
    model_name: str | None = None


def _annotation(annotation: Any) -> Any:
    """Converts an annotation of the quantizers to one that pydantic checks."""
    if annotation is registry.Inner:
        return Literal[tuple(name for name, entry in registry.QUANTIZERS.items() if entry.inner)]
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is tuple:
        return tuple[_annotation(arguments[0]), ...]
    if typing.get_origin(annotation) is not Annotated:
        return annotation
    kind, setting = _annotation(arguments[0]), arguments[-1]
    limits = {name: vars(setting)[name] for name in ("ge", "gt", "le") if vars(setting)[name] is not None}
    if kind is float:
        limits = {"le": 1e9, "allow_inf_nan": False} | limits
    return Annotated[kind, Field(**limits)] if limits else kind


def _quantizer_params() -> type[Section]:
    """Builds the section of all settings in the registry of quantizers."""
    fields: dict[str, Any] = {}
    for path, setting in registry.all_settings().items():
        section, _, name = path.rpartition(".")
        if section:
            kind = _annotation(setting.annotation)
            kind = kind | None if setting.default is None else kind
            fields[name] = (kind, Field(setting.default, description=setting.doc))
    doc = "Settings of the quantizers, see docs/quantizers.md; each quantizer reads some of them."
    return pydantic.create_model("QuantizerParams", __base__=Section, __module__=__name__, __doc__=doc, **fields)


QuantizerParams = _quantizer_params()


class ModelConfig(Section):
    """image -> encoder -> quantizer -> decoder -> image."""

    encoder_cls: EncoderClass = "Dinov2withNorm"
    # Hub id or local folder with config.json, preprocessor_config.json and safetensors weights. None: random weights of
    # `encoder_params.architecture`.
    encoder_config_path: str | None = "facebook/dinov2-base"
    encoder_params: EncoderParams = EncoderParams()
    encoder_input_size: Pixels = 224  # pixels; images of another size are resized bicubically
    decoder_config_path: str = "vit_mae-base"  # ViT-S, ViT-B, ViT-L, ViT-XL, a folder or a hub id
    # Pixels; the output is latent grid * decoder_patch_size.
    decoder_patch_size: Annotated[int, Field(ge=1, le=256)] = 16
    decoder_train_pos_embed: bool = False  # whether the decoder's position table trains
    pretrained_decoder_path: str | None = None  # hub id or file of a decoder to start from
    decoder_features: tuple[Block, ...] = ()  # encoder blocks that an additional head predicts
    noise_tau: NonNegative = 0.0  # latent noise in training: sigma = noise_tau * uniform(0, 1) per image
    reshape_to_2d: bool = True  # latents [B, h, w, C]; False: [B, N, C]
    normalization_stat_path: str | None = None  # .npz or .pt: mean and/or var of the latents, principal axes
    # none: the continuous autoencoder RAE
    quantizer: Literal[tuple(registry.QUANTIZERS)] = "ema"
    quantizer_params: QuantizerParams = QuantizerParams()
    num_embeddings: Annotated[int, Field(ge=1, le=2**26)] = 8192  # codebook size K; fsq computes it from its levels
    commitment_cost: NonNegative = 0.25  # all but fsq, where it is 1, and gumbel
    vq_decay: Decay = 0.99  # ema
    vq_epsilon: Above0 = 1e-5  # ema
    quantize_before_reshape: bool = False  # True: indices [B, N]; False: [B, h, w]
    # ema, simvq, gumbel, ibq: initial codebook by k-means of the first batch, latents of it, or random as in the papers
    codebook_init: Literal["kmeans", "data", "normal"] = "kmeans"
    revival_threshold: NonNegative = 0.2  # share of the mean EMA count below which a code is revived; 0: never
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters, distances and losses stay float32
    # cudnn: NVIDIA's fused kernel on GPUs, for dtype bfloat16; the same as xla elsewhere
    attention: Literal["xla", "cudnn"] = "xla"
    remat: bool = False  # recompute decoder blocks in the backward pass: less memory, about a third more FLOPs

    @pydantic.model_validator(mode="after")
    def _cudnn_needs_bfloat16(self):
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            message = f"needs model.dtype='bfloat16', got {self.dtype!r}; set it, or model.attention='xla'"
            raise invalid("attention", self.attention, message)
        return self


class DataConfig(Section):
    """The source of images, their crops and batches."""

    source: Literal["photographs", "folder", "webdataset", "parquet", "tfds"] = "folder"
    # Local or in a bucket (gs://, s3://). folder: a folder of images, flat or in class subfolders; webdataset (.tar
    # shards) and parquet (.parquet or .arrow files with encoded images): a folder, a file or a pattern as in
    # "data/train-*.tar"; tfds: data_dir or prepared folder.
    path: str | None = None
    eval_path: str | None = None  # validation images, see path; None: no evaluation
    name: str | None = None  # tfds: name of the dataset, as in "imagenet2012"; None for a prepared folder
    # webdataset: endings of members, as "seg.png", "cls" or "json.label" (a field of .json); parquet: columns; tfds:
    # features. None: the usual ones, see docs/train.md.
    image_key: str | None = None
    label_key: str | None = None
    train_split: str = "train"  # tfds split expressions
    eval_split: str = "validation"
    image_size: Pixels = 256  # pixels, square
    # random: short side to image_size * resize, then a random square; adm: random crop of guided-diffusion
    crop: Literal["random", "center", "adm"] = "random"
    eval_crop: Literal["center", "adm"] = "center"  # adm: center crop of guided-diffusion
    resize: Annotated[float, Field(ge=1, le=64, allow_inf_nan=False)] = 1.0  # short side / image_size, before the crop
    # Range of the side of a random crop in source pixels / image_size, log-uniform; (1, 1): see crop and resize.
    scale: tuple[Above0, Above0] = (1.0, 1.0)
    flip: bool = True  # mirror left-right with probability 1/2
    batch_size: Batch = 256  # images of one optimizer step, over all devices
    eval_batch_size: Batch = 256
    # Larger images are skipped and counted before they are decoded, which takes about 8 bytes per pixel.
    max_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = 64_000_000  # at most Pillow's own limit
    workers: Annotated[int, Field(ge=0, le=1024)] = 0  # worker processes that read images; 0: threads of this process
    threads: Few = 4

    @pydantic.model_validator(mode="after")
    def _scale_is_a_range(self):
        if self.scale[0] > self.scale[1]:
            raise invalid("scale", self.scale, "the first number must not exceed the second")
        return self


class PerceptualConfig(Section):
    """A distance between two images in the features of a frozen network."""

    # encoder: patch tokens of any encoder of the model section
    network: Literal["lpips", "encoder"] = "lpips"
    weight: NonNegative = 0.0  # 0: switched off, no weights are read
    start_steps: Count = 0  # steps before the term starts
    start_epochs: Epochs = None
    trunk: str = "timm/vgg16.tv_in1k"  # lpips: hub id or file of VGG16
    heads: str = "chaofengc/IQA-PyTorch-Weights/LPIPS_v0.1_vgg-a78928a0.pth"  # lpips: hub id or file of version 0.1
    path: str | None = None  # encoder: hub id or folder; None: random weights of `architecture`
    encoder_cls: EncoderClass = "Dinov2withNorm"  # encoder
    architecture: Architecture = {}  # encoder without pretrained weights, as in encoder_params
    layers: tuple[Block, ...] = (-1,)  # encoder: blocks that are compared
    input_size: Pixels = 224  # encoder: pixels
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations


class LossConfig(Section):
    """Terms of the tokenizer's loss; a weight of 0 switches a term off."""

    pixel: Literal["l1", "l2"] = "l1"
    pixel_weight: NonNegative = 1.0
    vq_weight: NonNegative = 1.0
    perceptual: PerceptualConfig = PerceptualConfig()
    feature_weight: NonNegative = 0.0  # the decoder's prediction of model.decoder_features
    feature_distance: Literal["cosine", "l2"] = "cosine"
    distill_weight: NonNegative = 0.0  # keeps a trained encoder close to its frozen copy
    distill_distance: Literal["cosine", "l2"] = "l2"


Metric = Literal["lpips", "inception", "encoder", "linear_probe"]


class EvaluationConfig(Section):
    """Metrics of the validation images in addition to PSNR, SSIM and codebook usage.

    inception and encoder: Frechet, kernel and paired distances in the features of that network, and the Inception
    score; lpips: with the weights of loss.perceptual.trunk and heads.
    """

    metrics: tuple[Metric, ...] = ("linear_probe",)  # of --mode=evaluate
    training_metrics: tuple[Metric, ...] = ()  # of each evaluation during training
    images: Positive | None = None  # number of validation images, from the first; None: all
    # File pt_inception-2015-12-05-6726825d.pth of pytorch-fid or torch-fidelity, or its tensors as safetensors or npz.
    inception_path: str | None = None
    # .npz with mu and sigma, or a folder of images, for FID; rFID compares with the validation images themselves.
    inception_reference: str | None = None
    encoder_cls: EncoderClass = "Dinov2withNorm"
    encoder_path: str = "facebook/dinov2-large"  # hub id or local folder; this one gives FD-DINOv2
    encoder_input_size: Pixels = 224  # pixels
    encoder_pool: Literal["cls", "mean"] = "cls"  # class token, or mean of the patch tokens
    encoder_reference: str | None = None
    kernel_images: Annotated[int, Field(ge=2, le=50_000)] = 5_000  # the kernel distance compares all pairs of them
    examples: Few = 4  # images in each of the rows best, median and worst of the page


class AdamWConfig(Section):
    """AdamW and its schedule in optimizer steps; a field in epochs (passes over the training images) replaces steps."""

    learning_rate: Above0 = 2e-4
    final_learning_rate: NonNegative = 2e-5
    reference_batch: Positive | None = None  # the rates above are scaled by data.batch_size over this
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Count = 0
    warmup_epochs: Epochs = None
    decay_end_steps: Count | None = None  # None: train.steps
    decay_end_epochs: Epochs = None
    b1: Decay = 0.9
    b2: Decay = 0.95
    weight_decay: NonNegative = 0.0  # on kernels only
    clip_norm: NonNegative = 0.0  # largest global gradient norm; 0: no clipping


class AdversaryConfig(Section):
    """A discriminator and its term of the tokenizer's loss."""

    discriminator: Literal["none", "dino", "patch"] = "none"
    weight: NonNegative = 0.75
    adaptive: bool = True  # multiply the weight by the ratio of gradients at the decoder's last layer
    adaptive_max: Above0 = 1e4
    start_steps: Count = 0  # steps before the discriminator trains
    start_epochs: Epochs = None
    generator_start_steps: Count = 0  # steps before the decoder trains against it
    generator_start_epochs: Epochs = None
    disc_updates: Few = 1  # updates per step of the tokenizer
    loss: Literal["hinge", "vanilla"] = "hinge"
    generator_loss: Literal["vanilla", "non_saturating"] = "vanilla"  # vanilla: negative mean logit
    lecam_weight: NonNegative = 0.0
    lecam_decay: Decay = 0.999
    augment: Fraction = 1.0  # probability of each of DiffAug's translation, colour and cutout
    cutout: Fraction = 0.0  # side of the cutout relative to the image
    path: str = "facebook/dino-vits8"  # dino: hub id, folder, or file of the DINO authors
    trunk_heads: Few | None = None  # dino: attention heads; None: one per 64 channels
    # dino: blocks with a head, in addition to the last
    taps: tuple[Annotated[int, Field(ge=0, le=1024)], ...] = (2, 5, 8, 11)
    window: Annotated[int, Field(ge=1, le=255)] = 9  # dino: width of a head's convolution in tokens
    norm: Literal["batch", "group"] = "batch"  # batch: statistics of each image by itself
    spectral: bool = True  # spectral normalization
    width: Few = 64  # patch: channels of the first layer
    layers: Annotated[int, Field(ge=1, le=16)] = 3  # patch
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations
    optimizer: AdamWConfig = AdamWConfig()  # its steps and epochs are counted from start_steps


class OptimizerConfig(AdamWConfig):
    """The optimizer of the tokenizer."""

    encoder_rate: NonNegative = 1.0  # learning rate of a part relative to the schedule
    quantizer_rate: NonNegative = 1.0
    decoder_rate: NonNegative = 1.0
    constant: tuple[Part, ...] = ()  # parts whose rate stays constant after warm-up
    accumulate: Batch = 1  # micro-batches per optimizer step
    ema_decay: Decay = 0.9978  # of the parameters
    ema_warmup: bool = True  # limits the decay of step t to (1 + t) / (10 + t), for short runs


class TrainConfig(Section):
    """Length, seed, logging and checkpoints of a run."""

    steps: Positive = 100_000
    # Passes over the training images, in place of steps; steps on the command line override epochs in a file.
    epochs: Epochs = None
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    trainable: tuple[Part, ...] = ("quantizer", "decoder")
    # Workdir or checkpoint of another run, whose EMA parameters and codebook a new run starts from, at step 0.
    start_from: str | None = None
    start_parts: tuple[Part, ...] = ()  # parts that are loaded from it; (): all
    start_renames: dict[str, str] = {}  # prefix of a path in that checkpoint -> its name in this config
    log_every: Positive = 50
    evaluate_every: Positive = 5_000
    checkpoint_every: Positive = 1_000
    keep_last: Positive = 3
    keep_best: Count = 1  # checkpoints with the highest validation PSNR
    codebook_alarm: Fraction = 0.1  # warn if a log window uses a smaller share of the codes; 0: never
    keep_every: Count = 0  # checkpoints at multiples of this step are never deleted; 0: none
    hang_seconds: NonNegative = 900  # seconds without a step until all stacks are printed; 0: never
    log_images: Few = 8  # validation images in the logged grid of reconstructions
    wandb_project: str | None = None  # also log to Weights & Biases


class MeshConfig(Section):
    """The mesh of devices."""

    data: Annotated[int, Field(ge=-1, le=MAX_STEPS)] = -1  # devices along "data"; -1: all that remain
    model: Positive = 1  # devices along "model": attention heads, mlp and codebook are split
    slices: Positive = 1  # TPU slices (or nodes) that split only the batch; parameters are replicated
    fsdp: bool = False  # split parameters, optimizer and EMA over "data" as well
    fsdp_min_size: Positive = 65_536  # arrays with fewer elements are not split


class Config(Section):
    """The config of a run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    adversary: AdversaryConfig = AdversaryConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()

    @pydantic.model_validator(mode="after")
    def _batch_is_divisible(self):
        if self.data.batch_size % self.optimizer.accumulate:
            message = f"must be a multiple of optimizer.accumulate={self.optimizer.accumulate}"
            raise invalid("data.batch_size", self.data.batch_size, message)
        return self

    @pydantic.model_validator(mode="after")
    def _terms_have_their_inputs(self):
        loss, adversary, trainable = self.loss, self.adversary, self.train.trainable
        if loss.feature_weight and not self.model.decoder_features:
            message = "needs model.decoder_features, the encoder blocks to predict"
            raise invalid("loss.feature_weight", loss.feature_weight, message)
        if loss.distill_weight and "encoder" not in trainable:
            message = f"is for an encoder that trains, but train.trainable={trainable} does not contain it"
            raise invalid("loss.distill_weight", loss.distill_weight, message)
        if adversary.discriminator != "none" and adversary.adaptive and "decoder" not in trainable:
            message = f"needs gradients of the decoder, but train.trainable={trainable} does not contain it"
            raise invalid("adversary.adaptive", True, message)
        return self
