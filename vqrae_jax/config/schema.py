"""The schema of a run: every field, its default and its range.

The comment above or behind a field is its documentation, which `python docs/write_reference.py` writes to
docs/config.md. Settings of the quantizers are documented in their registry. The model section keeps the names and the
defaults in the documentation of the PyTorch VQRAE; docs/from_pytorch.md has those of its newest version. Sections are
frozen. The type of a field is its range; conditions between fields are checked by the section that contains them. Upper
limits are far above sensible values: a mistyped number is refused before it becomes memory, threads or an endless loop.
"""

import dataclasses
import math
import os
import typing
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field
from pydantic_core import PydanticCustomError

from vqrae_jax.errors import ConfigError
from vqrae_jax.generation.sampler_config import SamplerConfig
from vqrae_jax.quantizers import registry
from vqrae_jax.quantizers.fusion import LEARNED, Method

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
ImageSource = Literal["photographs", "folder", "webdataset", "parquet", "tfds"]
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
    """A frozen group of fields that rejects unknown names.

    Of texts, "None" (as the command line gives it) becomes None, and a leading ~ the user's home folder.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _read_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return None if value == "None" else os.path.expanduser(value)


class EncoderParams(Section):
    """The features of the encoder that become latents, and an encoder without pretrained weights."""

    normalize: bool = True  # normalize every latent to mean 0 and variance 1, without trained scale and bias, as in RAE
    # Blocks whose patch tokens are used, from 0 or from the end; usually the last, or three as in (2, 6, -1).
    layers: tuple[Block, ...] = (-1,)
    # Combination of several blocks into one latent; concat adds their channels; linear and routed are learned as a part
    # of the quantizer, see docs/train.md.
    fusion: Literal["sum", "mean", "concat", Method] = "mean"
    # Size of an encoder with random weights, in fields of a hub config.json as {"hidden_size": 192}, and image_mean and
    # image_std of its preprocessor_config.json (default: ImageNet's); only with encoder_config_path=None.
    architecture: Architecture = {}
    # Hub id or folder of the weights, if it is not encoder_config_path; a name of the PyTorch VQRAE.
    dinov2_path: str | None = None
    dinov3_path: str | None = None  # see dinov2_path
    model_name: str | None = None  # see dinov2_path


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


class _Sampler(Section):
    @pydantic.model_validator(mode="after")
    def _values_are_in_range(self):
        try:
            SamplerConfig(**self.model_dump())
        except ConfigError as error:
            raise invalid(error.field, error.value, error.message) from None
        return self


def _sampler() -> type[Section]:
    """Builds the section of the settings of `SamplerConfig`."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(SamplerConfig):
        kind, doc = typing.get_args(field.type)
        fields[field.name] = kind, Field(field.default, description=doc)
    doc = "How a generator is sampled, see docs/generate.md."
    return pydantic.create_model("Sampler", __base__=_Sampler, __module__=__name__, __doc__=doc, **fields)


Sampler = _sampler()


class GeneratorConfig(Section):
    """The second stage: a transformer over the codes of a tokenizer, see docs/generate.md.

    Used with train.task="generator", which does not read the sections model, loss and adversary.
    """

    # Workdir, checkpoint, saved folder or hub id of the tokenizer whose codes are generated. Required unless
    # data.source="codes", which then trains without pictures of samples.
    tokenizer: Annotated[str, Field(min_length=1)] | None = None
    # Hash of this tokenizer, which the codes must have; None: the hash of the tokenizer, or of the codes.
    tokenizer_hash: str | None = None
    # Masked diffusion (MaskGIT, MDLM, MD4), or prediction of codes in an order (GPT, RAR).
    family: Literal["masked", "autoregressive"] = "masked"
    # Rows and columns of each grid of codes, as ((16, 16),); several with a multiscale tokenizer. This and the next
    # three are those of the data by default, but preflight reads no data.
    grids: tuple[tuple[Few, Few], ...] = ()
    levels: Few | None = None  # codes per position: 1, or the levels or groups of the tokenizer
    num_embeddings: Annotated[int, Field(ge=2, le=2**26)] | None = None  # codes K of the tokenizer, of each level
    classes: Annotated[int, Field(ge=0, le=2**20)] | None = None  # number of classes; 0: images without a class
    width: Annotated[int, Field(ge=1, le=LARGEST_SIZE)] = 768  # channels of the transformer
    depth: Few = 24  # number of blocks
    heads: Few = 16  # attention heads
    mlp: Annotated[int, Field(ge=1, le=LARGEST_SIZE)] = 3072  # hidden channels of the MLP, usually 4 times the width
    gated: bool = False  # gate the MLP with SiLU (SwiGLU)
    qk_norm: bool = True  # normalize queries and keys, which keeps large models stable
    pos: Literal["learned", "rope"] = "learned"  # positions: a learned table, or rotary in two dimensions
    class_token: bool = True  # the class is a token in front of the codes
    adaln: bool = False  # the class modulates the norms of all blocks (adaLN-zero)
    registers: Annotated[int, Field(ge=0, le=1024)] = 0  # learned tokens in front of the codes
    dropout: Decay = 0.1  # of the outputs of attention and MLP
    # Vectors of the codes at the input: a learned table, or the tokenizer's codebook, which does not train.
    input: Literal["table", "codebook"] = "table"
    # Channels of the codebook with input="codebook"; 0: those of the tokenizer.
    code_channels: Annotated[int, Field(ge=0, le=LARGEST_SIZE)] = 0
    tied: bool = True  # the head multiplies with the vectors of the input
    # Sizes of digits that the head predicts independently, with product num_embeddings, as (512, 256); (): whole codes.
    factors: tuple[Annotated[int, Field(ge=2, le=2**20)], ...] = ()
    class_dropout: Fraction = 0.1  # probability of training without the class, for classifier-free guidance
    schedule: Literal["cosine", "linear", "arccos"] = "cosine"  # share of codes that are hidden over time, in training
    # Loss of masked diffusion: MaskGIT's mean over hidden codes, or the bound of the likelihood (MDLM, MD4).
    loss: Literal["mean", "bound"] = "mean"
    # Probability that the loss spreads over all codes, 0.1 in MaskGIT; not in the validation loss.
    smoothing: Decay = 0.0
    # Limit of the weights of loss="bound" (min-SNR), usually 5; None: no limit.
    max_snr: Annotated[float, Field(gt=0, le=1e6)] | None = None
    # Autoregression: steps with random orders only, before they become rarer (RAR); 200 of 400 epochs there.
    permuted_steps: Count = 0
    permuted_epochs: Epochs = None  # permuted_steps in epochs
    raster_steps: Count = 0  # step from which all orders are row by row; 0: from the start
    raster_epochs: Epochs = None  # raster_steps in epochs
    dtype: Literal["float32", "bfloat16"] = "float32"  # type of activations; norms, softmax and losses stay float32
    attention: Literal["xla", "cudnn"] = "xla"  # kernel of attention, as in model.attention
    remat: bool = False  # recompute blocks in the backward pass: less memory, about a third more FLOPs
    sampler: Sampler = Sampler()

    @pydantic.model_validator(mode="after")
    def _fields_fit_together(self):
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise invalid("attention", self.attention, "needs generator.dtype='bfloat16', or generator.attention='xla'")
        if self.width % self.heads:
            raise invalid("width", self.width, f"must be a multiple of generator.heads={self.heads}")
        if self.pos == "rope" and self.width // self.heads % 4:
            message = f"rotary positions need a multiple of 4 channels per head, not {self.width // self.heads}"
            raise invalid("pos", self.pos, message)
        for unit in ("steps", "epochs"):
            permuted, raster = getattr(self, f"permuted_{unit}") or 0, getattr(self, f"raster_{unit}") or 0
            if raster < permuted and (raster or not (self.raster_steps or self.raster_epochs)):
                message = f"must be at least permuted_{unit}={permuted}"
                raise invalid(f"raster_{unit}", getattr(self, f"raster_{unit}"), message)
        if self.num_embeddings and self.factors and math.prod(self.factors) != self.num_embeddings:
            raise invalid("factors", self.factors, f"the product must be num_embeddings={self.num_embeddings}")
        if self.max_snr and self.loss != "bound":
            raise invalid("max_snr", self.max_snr, "is for generator.loss='bound'")
        if self.family == "masked" and (self.permuted_steps or self.raster_steps or self.raster_epochs):
            message = "orders are for generator.family='autoregressive'; leave it at 0"
            raise invalid("raster_steps", self.raster_steps, message)
        if self.code_channels and self.input != "codebook":
            raise invalid("code_channels", self.code_channels, "is for generator.input='codebook'; leave it at 0")
        if self.factors and self.tied and self.input == "codebook":
            raise invalid("tied", True, "codebook vectors have no digits; set tied=False, input='table' or factors=()")
        return self


class ModelConfig(Section):
    """image -> encoder -> quantizer -> decoder -> image."""

    # Family of the encoder, with its names from the PyTorch VQRAE: DINOv2, DINOv3, SigLIP and SigLIP 2, or MAE.
    encoder_cls: EncoderClass = "Dinov2withNorm"
    # Hub id or local folder of the encoder, with config.json, preprocessor_config.json and safetensors weights. None:
    # random weights, of the size in encoder_params.architecture.
    encoder_config_path: str | None = "facebook/dinov2-base"
    encoder_params: EncoderParams = EncoderParams()
    # Side of the images that the encoder sees, in pixels; others are resized bicubically. The latent grid is this over
    # the patch size of the encoder: 224 / 14 = 16.
    encoder_input_size: Pixels = 224
    # Size of the decoder: ViT-S, ViT-B, ViT-L or ViT-XL, or a folder or hub id with config.json; None: that of
    # decoder_architecture.
    decoder_config_path: str | None = "vit_mae-base"
    # Size of the decoder, in fields of a ViT-MAE's config.json as {"decoder_hidden_size": 512}; only with
    # decoder_config_path=None.
    decoder_architecture: Architecture = {}
    # Side of the square that the decoder predicts for a latent, in pixels, usually 16; images have grid times this.
    decoder_patch_size: Annotated[int, Field(ge=1, le=256)] = 16
    # What a latent predicts: its square (linear, as in PyTorch), or one of twice the side that overlaps and is added to
    # those of its neighbours, so that no border of a square is visible (overlap).
    decoder_head: Literal["linear", "overlap"] = "linear"
    decoder_train_pos_embed: bool = False  # train the position table of the decoder, which starts as sines and cosines
    pretrained_decoder_path: str | None = None  # hub id or file of a decoder to start from, as owner/name/path/to/file
    # Blocks of the encoder, from 0 or from the end, that an additional head of the decoder predicts.
    decoder_features: tuple[Block, ...] = ()
    # Transformer blocks of this head, with four registers, in front of its linear layer; 0: the linear layer alone.
    decoder_feature_blocks: Annotated[int, Field(ge=0, le=1024)] = 0
    # Number of tokens that become codes, in place of the latent grid: learned queries with cross-attention, a part of
    # the quantizer, see docs/train.md; usually 32 to 256. 0: the grid.
    resampler_tokens: Annotated[int, Field(ge=0, le=65_536)] = 0
    resampler_blocks: Annotated[int, Field(ge=0, le=64)] = 2  # blocks of cross-attention between grid and tokens
    resampler_nested: bool = False  # train on the first 1, 2, 4, ... tokens of an image as well: prefixes decode
    # Side of the decoder's grid, in patches, with resampler_tokens; 0: that of the latent grid.
    decoder_grid: Annotated[int, Field(ge=0, le=1024)] = 0
    # Noise of the latents (with a learned fusion, of its layers) in training: normal, of standard deviation
    # uniform(0, noise_tau) per image; RAE has 0.8.
    noise_tau: NonNegative = 0.0
    reshape_to_2d: bool = True  # latents are a grid [B, h, w, C]; False: rows [B, N, C]
    # File, .npz or .pt, of the mean, the variance and the principal axes of the latents, which normalize them.
    normalization_stat_path: str | None = None
    quantizer: Literal[tuple(registry.QUANTIZERS)] = "ema"  # method, see docs/quantizers.md; none: the continuous RAE
    quantizer_params: QuantizerParams = QuantizerParams()
    quantize_before_reshape: bool = False  # quantize rows, so that indices are [B, N]; False: a grid, [B, h, w]
    # Settings of the quantizers, documented in their registry.
    num_embeddings: Annotated[int, Field(ge=1, le=2**26)] = 8192
    commitment_cost: NonNegative = 0.25
    vq_decay: Decay = 0.99
    vq_epsilon: Above0 = 1e-5
    codebook_init: Literal["kmeans", "data", "normal"] = "kmeans"
    revival_threshold: NonNegative = 0.2
    # Type of activations; parameters, distances and losses stay float32. bfloat16 is faster on TPU and GPU and halves
    # their memory.
    dtype: Literal["float32", "bfloat16"] = "float32"
    # Kernel of attention: XLA's, or NVIDIA's fused one, which needs a GPU and dtype bfloat16; elsewhere both are XLA's.
    attention: Literal["xla", "cudnn"] = "xla"
    remat: bool = False  # recompute decoder blocks in the backward pass: less memory, about a third more FLOPs

    @pydantic.model_validator(mode="after")
    def _cudnn_needs_bfloat16(self):
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            message = f"needs model.dtype='bfloat16', got {self.dtype!r}; set it, or model.attention='xla'"
            raise invalid("attention", self.attention, message)
        return self

    @pydantic.model_validator(mode="after")
    def _feature_blocks_have_features(self):
        if self.decoder_feature_blocks and not self.decoder_features:
            message = "needs model.decoder_features, the encoder blocks to predict; or use 0"
            raise invalid("decoder_feature_blocks", self.decoder_feature_blocks, message)
        return self

    @pydantic.model_validator(mode="after")
    def _statistics_are_of_fixed_latents(self):
        fusion, tokens = self.encoder_params.fusion, self.resampler_tokens
        learned = f"model.resampler_tokens={tokens}" if tokens else f"model.encoder_params.fusion={fusion!r}"
        statistics = {
            "normalization_stat_path": (self.normalization_stat_path, "a file"),
            "quantizer_params.whitening_dim": (self.quantizer_params.whitening_dim, "axes of the first batch"),
        }
        for name, (value, what) in statistics.items():
            if value and (fusion in LEARNED or tokens):
                raise invalid(name, value, f"{what} cannot describe latents of {learned}, which train; use None")
        return self

    @pydantic.model_validator(mode="after")
    def _resampler_fits(self):
        for name in ("resampler_blocks", "resampler_nested", "decoder_grid"):
            default = type(self).model_fields[name].default
            if getattr(self, name) != default and not self.resampler_tokens:
                raise invalid(name, getattr(self, name), f"is for model.resampler_tokens; use {default} without it")
        needs_grid = {
            "quantize_before_reshape": self.quantize_before_reshape, "quantizer": self.quantizer == "multiscale",
            "pretrained_decoder_path": self.pretrained_decoder_path is not None,
            "reshape_to_2d": not self.reshape_to_2d,
        }  # fmt: skip
        for name, refused in needs_grid.items():
            if self.resampler_tokens and refused:
                raise invalid(name, getattr(self, name), "is for a grid of latents; set model.resampler_tokens=0")
        if self.resampler_nested and self.quantizer in ("none", "residual", "product"):
            message = "has not one code per token; set model.resampler_nested=False"
            raise invalid("quantizer", self.quantizer, message)
        if self.decoder_grid and self.decoder_features:
            message = "predicts features on the latent grid; set model.decoder_grid=0"
            raise invalid("decoder_features", self.decoder_features, message)
        return self


class DataConfig(Section):
    """The source of images, their crops and batches; or that of codes."""

    # Format of the images: files, tar shards, .parquet or .arrow files, a TFDS dataset, or the photographs that
    # scikit-image and scikit-learn ship. codes: what `vqrae tokenize` wrote, in any of its formats; without name, keys,
    # splits, crop, flip and workers.
    source: Literal[ImageSource, "codes"] = "folder"
    # Training images, local or in a bucket (gs://, s3://). folder: a folder of images, flat or in class subfolders;
    # webdataset and parquet: a folder, a file, patterns as in "data/train-{000..127}.tar::data/more/*.tar", or the hub
    # id of a dataset; tfds: data_dir or prepared folder; codes: the --output of `vqrae tokenize`.
    path: str | None = None
    eval_path: str | None = None  # validation images, in the form of path; None: no evaluation
    # Name of the TFDS dataset, as in "imagenet2012", None for a prepared folder; configuration of a hub dataset.
    name: str | None = None
    # Ending of members (webdataset, as "seg.png"), column (parquet) or feature (tfds) that holds the images; None: the
    # usual ones, see docs/train.md.
    image_key: str | None = None
    # Ending, column or feature that holds integer labels, as "cls", or "json.label" for a field of a member .json.
    label_key: str | None = None
    train_split: str = "train"  # split of the training images, as in "train[:90%]" (TFDS) or "train" (hub)
    eval_split: str = "validation"  # split of the validation images (TFDS, hub)
    image_size: Pixels = 256  # side of the square images after the crop, in pixels; usually 256
    # Crop of training images: a random or the central square after resize, or guided-diffusion's random crop.
    crop: Literal["random", "center", "adm"] = "random"
    eval_crop: Literal["center", "adm"] = "center"  # crop of validation images; adm: guided-diffusion's center crop
    # Short side before the crop, relative to image_size; 1 keeps as much of the image as possible, RAE has 1.5.
    resize: Annotated[float, Field(ge=1, le=64, allow_inf_nan=False)] = 1.0
    # Smallest and largest side of a random crop in source pixels, relative to image_size, log-uniform. (1, 1): the crop
    # follows crop and resize.
    scale: tuple[Above0, Above0] = (1.0, 1.0)
    flip: bool = True  # mirror left and right with probability 1/2
    batch_size: Batch = 256  # images of one optimizer step over all devices, usually 256 to 1024
    eval_batch_size: Batch = 256  # images of one evaluation step over all devices
    # Most pixels of a source image; larger ones are skipped and counted. Decoding takes up to 8 bytes per pixel, and
    # Pillow has the upper limit.
    max_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = 64_000_000
    workers: Annotated[int, Field(ge=0, le=1024)] = 0  # processes of each host that read images; 0: threads of the run
    threads: Few = 4  # threads of each such process; usually the number of cores of the host

    @pydantic.model_validator(mode="after")
    def _scale_is_a_range(self):
        if self.scale[0] > self.scale[1]:
            raise invalid("scale", self.scale, "the first number must not exceed the second")
        return self

    @pydantic.model_validator(mode="after")
    def _codes_have_no_crops(self):
        names = (
            "name", "image_key", "label_key", "train_split", "eval_split", "crop", "resize", "scale", "flip", "workers",
        )  # fmt: skip
        for name in names if self.source == "codes" else ():
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default:
                message = f"has no effect on data.source='codes'; leave it at {default!r}"
                raise invalid(name, value, message)
        return self


class PerceptualConfig(Section):
    """A distance between two images in the features of a frozen network."""

    # LPIPS, or the patch tokens of an encoder of any family.
    network: Literal["lpips", "encoder"] = "lpips"
    weight: NonNegative = 0.0  # weight in the loss, usually 1; 0: off, and no weights are read
    # Weight of the distance between the Gram matrices of the same features, in [0, 2], which ignores positions; usually
    # about 1.
    gram_weight: NonNegative = 0.0
    start_steps: Count = 0  # steps before the term starts
    start_epochs: Epochs = None  # start_steps in epochs
    trunk: str = "timm/vgg16.tv_in1k"  # hub id or file of LPIPS's VGG16
    # Hub id or file of LPIPS's linear heads, version 0.1.
    heads: str = "chaofengc/IQA-PyTorch-Weights/LPIPS_v0.1_vgg-a78928a0.pth"
    path: str | None = None  # hub id or folder of the encoder; None: random weights of the size in architecture
    encoder_cls: EncoderClass = "Dinov2withNorm"  # family of the encoder
    architecture: Architecture = {}  # size of an encoder with random weights, as in model.encoder_params
    layers: tuple[Block, ...] = (-1,)  # blocks of the encoder that are compared, from 0 or from the end
    input_size: Pixels = 224  # side of the images that the encoder sees, in pixels
    dtype: Literal["float32", "bfloat16"] = "float32"  # type of activations; bfloat16 is faster on TPU and GPU

    @pydantic.model_validator(mode="after")
    def _gram_has_features(self):
        if self.gram_weight and not self.weight:
            message = "is a second term of the features of loss.perceptual.weight, which must be above 0"
            raise invalid("gram_weight", self.gram_weight, message)
        return self


class LossConfig(Section):
    """Terms of the tokenizer's loss; a weight of 0 switches a term off."""

    pixel: Literal["l1", "l2"] = "l1"  # mean absolute (l1) or mean squared (l2) difference of pixels in [0, 1]
    pixel_weight: NonNegative = 1.0  # weight of the difference of pixels, usually 1
    # Weight of the mean absolute difference of the steps between neighboring pixels, usually 0.5 to 1.
    gradient_weight: NonNegative = 0.0
    vq_weight: NonNegative = 1.0  # weight of the quantizer's loss, usually 1
    perceptual: PerceptualConfig = PerceptualConfig()
    feature_weight: NonNegative = 0.0  # weight of the decoder's prediction of model.decoder_features, usually 0.5 to 1
    feature_distance: Literal["cosine", "l2"] = "cosine"  # distance of predicted and true features
    distill_weight: NonNegative = 0.0  # weight of the distance of a trained encoder's latents to its frozen copy's
    distill_distance: Literal["cosine", "l2"] = "l2"  # distance of these latents


Metric = Literal["lpips", "inception", "encoder", "sfid", "precision_recall", "linear_probe"]


class EvaluationConfig(Section):
    """Metrics of the validation images in addition to PSNR, SSIM and codebook usage.

    inception and encoder: Frechet, kernel and paired distances in the features of that network, and the Inception
    score; sfid: the Frechet distance of Inception's spatial features; precision_recall: in the features of the chosen
    networks; lpips: with the weights of loss.perceptual.trunk and heads.
    """

    metrics: tuple[Metric, ...] = ("linear_probe",)  # metrics of --mode=evaluate
    training_metrics: tuple[Metric, ...] = ()  # metrics of each evaluation during training
    # Number of validation images, from the first; None: all. rFID is usually of 50,000.
    images: Positive | None = None
    # File pt_inception-2015-12-05-6726825d.pth of pytorch-fid or torch-fidelity, or its tensors as safetensors or npz.
    inception_path: str | None = None
    # .npz of ADM (mu and sigma; mu_s and sigma_s for sfid; arr_0 for precision_recall) or a folder of images, for FID.
    inception_reference: str | None = None
    encoder_cls: EncoderClass = "Dinov2withNorm"  # family of the metric encoder
    encoder_path: str = "facebook/dinov2-large"  # hub id or folder of the metric encoder; this one gives FD-DINOv2
    encoder_input_size: Pixels = 224  # side of the images that the metric encoder sees, in pixels
    encoder_pool: Literal["cls", "mean"] = "cls"  # features: the class token, or the mean of the patch tokens
    encoder_reference: str | None = None  # the same as inception_reference, in the features of the metric encoder
    # Number of images of the kernel distance, which compares all pairs of them.
    kernel_images: Annotated[int, Field(ge=2, le=50_000)] = 5_000
    examples: Few = 4  # number of images in each of the rows best, median and worst of the page
    # Number of images that a generator samples for metrics of inception and encoder; published FID is of 50,000.
    samples: Annotated[int, Field(ge=2, le=2**24)] = 10_000
    # Values of guidance that are compared; (): that of generator.sampler.
    guidances: tuple[Annotated[float, Field(ge=0, le=1e6)], ...] = ()
    sampler_steps: tuple[Positive, ...] = ()  # numbers of steps that are compared; (): that of generator.sampler

    @pydantic.model_validator(mode="after")
    def _metrics_have_their_networks(self):
        for field in ("metrics", "training_metrics"):
            metrics = getattr(self, field)
            for metric, networks in {"sfid": ("inception",), "precision_recall": ("inception", "encoder")}.items():
                if metric in metrics and not set(networks) & set(metrics):
                    raise invalid(field, metrics, f"{metric!r} needs {' or '.join(map(repr, networks))} as well")
        return self


class AdamWConfig(Section):
    """AdamW and its schedule in optimizer steps; a field in epochs (passes over the training images) replaces steps."""

    learning_rate: Above0 = 2e-4  # rate after warm-up, usually 1e-4 to 4e-4
    final_learning_rate: NonNegative = 2e-5  # rate at the end of the schedule, usually a tenth or less
    # Batch size for which both rates are meant: they are multiplied by data.batch_size over this. None: as they are.
    reference_batch: Positive | None = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # course of the rate between warm-up and end
    warmup_steps: Count = 0  # steps in which the rate rises linearly from 0; usually 1 to 5 % of the run
    warmup_epochs: Epochs = None  # warmup_steps in epochs
    decay_end_steps: Count | None = None  # step at which the rate reaches final_learning_rate; None: train.steps
    decay_end_epochs: Epochs = None  # decay_end_steps in epochs
    b1: Decay = 0.9  # decay of the mean of gradients
    b2: Decay = 0.95  # decay of the mean of squared gradients, usually 0.95 to 0.999
    weight_decay: NonNegative = 0.0  # decoupled weight decay, on kernels only; usually 0 to 0.05
    clip_norm: NonNegative = 0.0  # largest norm of all gradients together, usually 1; 0: no clipping


class AdversaryConfig(Section):
    """A discriminator and its term of the tokenizer's loss."""

    # Network: none; heads on a frozen DINO, as in RAE; or the PatchGAN of VQGAN, which needs no pretrained weights.
    discriminator: Literal["none", "dino", "patch"] = "none"
    weight: NonNegative = 0.75  # weight in the tokenizer's loss, usually 0.1 to 0.75
    # Multiply the weight by the ratio of both losses' gradients at the last layer of the decoder, as in VQGAN.
    adaptive: bool = True
    adaptive_max: Above0 = 1e4  # largest ratio of the gradients
    start_steps: Count = 0  # steps before the discriminator trains
    start_epochs: Epochs = None  # start_steps in epochs; 6 of 16 in RAE
    generator_start_steps: Count = 0  # steps before the decoder trains against it, at least start_steps
    generator_start_epochs: Epochs = None  # generator_start_steps in epochs; 8 of 16 in RAE
    disc_updates: Few = 1  # updates of the discriminator per step of the tokenizer
    # Loss of the discriminator: hinge, or vanilla, the cross-entropy.
    loss: Literal["hinge", "vanilla"] = "hinge"
    # Loss of the decoder: vanilla, the negative mean logit; or non_saturating, -log sigmoid of the logits.
    generator_loss: Literal["vanilla", "non_saturating"] = "vanilla"
    lecam_weight: NonNegative = 0.0  # weight of LeCam regularization, usually 0.001; 0: off
    lecam_decay: Decay = 0.999  # decay of LeCam's running means of logits
    # Weight of the squared difference of logits under two augmentations (bCR), 4 in DetailFlow; a second forward pass.
    consistency_weight: NonNegative = 0.0
    augment: Fraction = 1.0  # probability of each of DiffAug's translation, colour and cutout
    cutout: Fraction = 0.0  # side of the cutout relative to the image; 0: no cutout
    path: str = "facebook/dino-vits8"  # hub id, folder, or file of the DINO authors, of the dino network
    trunk_heads: Few | None = None  # attention heads of the dino network; None: one per 64 channels
    # Blocks of the dino network whose tokens are classified by a head each, in addition to the last.
    taps: tuple[Annotated[int, Field(ge=0, le=1024)], ...] = (2, 5, 8, 11)
    window: Annotated[int, Field(ge=1, le=255)] = 9  # width of the convolution of a dino head, in tokens
    norm: Literal["batch", "group"] = "batch"  # normalize channels (batch) or 32 groups of them, per image
    spectral: bool = True  # spectral normalization of the convolutions
    width: Few = 64  # channels of the first layer of the patch network
    layers: Annotated[int, Field(ge=1, le=16)] = 3  # strided convolutions of the patch network
    dtype: Literal["float32", "bfloat16"] = "float32"  # type of activations; bfloat16 is faster on TPU and GPU
    optimizer: AdamWConfig = AdamWConfig()  # its steps and epochs are counted from start_steps

    @pydantic.model_validator(mode="after")
    def _consistency_has_augmentations(self):
        if self.consistency_weight and not self.augment:
            message = "compares two augmentations of an image; set adversary.augment above 0, or leave it at 0"
            raise invalid("consistency_weight", self.consistency_weight, message)
        return self


class OptimizerConfig(AdamWConfig):
    """Optimizer of the tokenizer, with the fields of `adversary.optimizer`, and the average of its parameters."""

    # AdamW for all parameters; or Muon for the matrices of transformer blocks, with the same rates, and AdamW for the
    # others.
    method: Literal["adamw", "muon"] = "adamw"
    encoder_rate: NonNegative = 1.0  # learning rate of the encoder relative to the schedule, usually 0.1 if it trains
    quantizer_rate: NonNegative = 1.0  # learning rate of the quantizer relative to the schedule
    decoder_rate: NonNegative = 1.0  # learning rate of the decoder relative to the schedule
    constant: tuple[Part, ...] = ()  # parts whose learning rate stays constant after warm-up
    accumulate: Batch = 1  # micro-batches of one optimizer step; more take less memory and give the same gradients
    ema_decay: Decay = 0.9978  # decay per step of the moving average of the parameters, usually 0.99 to 0.9999
    ema_warmup: bool = True  # limit the decay of step t to (1 + t) / (10 + t), for short runs


class TrainConfig(Section):
    """Task, length, seed, logging and checkpoints of a run."""

    task: Literal["tokenizer", "generator"] = "tokenizer"  # first stage, images to codes; or second, on its codes
    steps: Positive = 100_000  # optimizer steps of the run
    # Passes over the training images, in place of steps; steps on the command line override epochs in a file.
    epochs: Epochs = None
    # Seed of the initial parameters, the order of images, their crops and all noise.
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    trainable: tuple[Part, ...] = ("quantizer", "decoder")  # parts that train; the others stay as they start
    # Largest share of an image's codes that training replaces by others, as errors of a generator do; every image has a
    # share between 0 and this.
    code_noise: Fraction = 0.0
    # Number of nearest codes that may replace a code, 100 in RobusTok; for lfq and bsq those that differ in the fewest
    # bits; 0: all codes.
    code_neighbors: Annotated[int, Field(ge=0, le=65_536)] = 0
    # Tokenizer that a new run starts from, at step 0: workdir or checkpoint of another run (its EMA parameters), saved
    # folder, or hub id. The model section must fit it.
    start_from: str | None = None
    start_parts: tuple[Part, ...] = ()  # parts that start_from loads; (): all
    start_renames: dict[str, str] = {}  # prefix of a path in start_from -> its name in this config
    log_every: Positive = 50  # steps between two lines of metrics
    evaluate_every: Positive = 5_000  # steps between two evaluations of the validation images
    checkpoint_every: Positive = 1_000  # steps between two checkpoints, which bound what an interruption costs
    # Minutes after which the next log line saves as well, 5 to 60, less where runs are preempted; 0: never.
    checkpoint_minutes: NonNegative = 15.0
    keep_last: Positive = 3  # number of newest checkpoints that are kept
    keep_best: Count = 1  # number of checkpoints with the highest validation PSNR (or fewest bits) that are kept
    codebook_alarm: Fraction = 0.1  # warn if a log window uses a smaller share of the codebook; 0: never
    keep_every: Count = 0  # checkpoints at multiples of this step are never deleted; 0: none
    hang_seconds: NonNegative = 900  # seconds without a step until all stacks are printed; 0: never
    log_images: Few = 8  # images in the logged grid of reconstructions
    wandb_project: str | None = None  # also log to this project of Weights & Biases


class MeshConfig(Section):
    """The mesh of devices."""

    data: Annotated[int, Field(ge=-1, le=MAX_STEPS)] = -1  # devices that split the batch; -1: all that remain
    model: Positive = 1  # devices that split attention heads, MLPs and the codebook, usually 1 to 8
    slices: Positive = 1  # TPU slices (or nodes) that split only the batch; parameters are replicated
    fsdp: bool = False  # split parameters, optimizer state and their moving average over the data axis as well
    fsdp_min_size: Positive = 65_536  # smallest number of elements of an array that fsdp splits


class Config(Section):
    """The config of a run."""

    model: ModelConfig = ModelConfig()
    generator: GeneratorConfig = GeneratorConfig()
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
    def _task_has_its_data(self):
        codes, generator = self.data.source == "codes", self.train.task == "generator"
        if codes and not generator:
            message = "is for generators; set train.task='generator', or images, which a tokenizer needs"
            raise invalid("data.source", "codes", message)
        if generator and not codes and not self.generator.tokenizer:
            message = "images need generator.tokenizer, which encodes them; or set data.source='codes'"
            raise invalid("generator.tokenizer", None, message)
        if generator and self.train.start_from:
            raise invalid("train.start_from", self.train.start_from, "is for tokenizers; leave it out")
        if generator and self.evaluation.training_metrics:
            message = "a generator is evaluated in bits while it trains; leave it at ()"
            raise invalid("evaluation.training_metrics", self.evaluation.training_metrics, message)
        if generator and "lpips" in self.evaluation.metrics:
            raise invalid(
                "evaluation.metrics", self.evaluation.metrics, "'lpips' compares reconstructions; leave it out"
            )
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
        if self.train.code_noise and self.model.quantizer == "none":
            message = "replaces codes, which model.quantizer='none' does not have; leave it at 0"
            raise invalid("train.code_noise", self.train.code_noise, message)
        if self.train.code_neighbors and not self.train.code_noise:
            message = "is for train.code_noise, which is 0; leave it at 0 as well"
            raise invalid("train.code_neighbors", self.train.code_neighbors, message)
        if adversary.discriminator != "none" and adversary.adaptive and "decoder" not in trainable:
            message = f"needs gradients of the decoder, but train.trainable={trainable} does not contain it"
            raise invalid("adversary.adaptive", True, message)
        return self
