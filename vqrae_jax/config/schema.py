"""The schema of a run: every field, its default, and what it accepts.

The model section keeps the vocabulary and the defaults of the PyTorch VQRAE. A section is frozen once built; what a
single field accepts is in its type, what fields ask of each other is checked by the section that owns both.
"""

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Epochs = NonNegative | None
Part = Literal["encoder", "quantizer", "decoder"]
EncoderClass = Literal["Dinov2withNorm", "Dinov3withNorm", "SigLIP2wNorm", "MAEwNorm"]


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

    # all but fsq, none: channels of the codes, by learned projections in and out; lfq, bsq: only log2 num_embeddings,
    # which they have by themselves
    codebook_dim: Positive | None = None
    # all but none: principal axes of the latent that are kept, at variance one; those of normalization_stat_path where
    # the file has them, else of the first batch
    whitening_dim: Positive | None = None
    distance: Literal["l2", "cosine", "dot"] | None = None  # ema (None: l2), simvq (None: cosine), ibq (None: l2)
    # ema, simvq: what gradient a latent receives through the choice of its code
    estimator: Literal["straight_through", "rotation", "distance_weighted"] = "straight_through"
    decay_warmup: bool = True  # ema: the decay of step t is t / (t + 1) until it reaches vq_decay
    frozen: bool = False  # ema: the first codes (codebook_init, or train.start_from's) never change
    input_projection: bool = False  # simvq: latents pass a learned linear map that nothing undoes, as in the origin
    legacy: bool = True  # simvq: commitment_cost weighs the codebook's term, as in the VQGAN release
    levels: tuple[Annotated[int, Field(ge=2)], ...] = (8, 5, 5, 5)  # fsq: values per quantized channel
    adapter: Literal["mlp", "linear", "none"] = "mlp"  # fsq: from the latent to the levels and back
    entropy_cost: NonNegative = 0.1  # lfq, bsq, ibq: certainty of each latent, diversity of the batch
    diversity: NonNegative = 1.0  # lfq, bsq: weight of the second
    diversity_cost: NonNegative = 0.0  # ema, simvq: log K less the entropy of the batch's mean soft code
    orthogonality_cost: NonNegative = 0.0  # simvq, ibq, gumbel: mean squared cosine between codes
    temperature: Above0 = 1.0  # lfq, bsq, ibq, gumbel; of diversity_cost: of the soft codes
    final_temperature: Above0 = 0.1  # gumbel: after anneal_steps
    anneal_steps: Positive = 10_000  # gumbel; each micro-batch of optimizer.accumulate counts
    inner: Literal["ema", "simvq", "lfq", "bsq", "gumbel", "ibq"] = "ema"  # residual, product, multiscale: made of
    depth: Positive = 4  # residual: levels
    shared: bool = False  # residual: one codebook for all levels
    dropout: Fraction = 0.0  # residual: share of images that train only a random prefix of the levels
    groups: Positive = 2  # product: groups of channels
    grids: tuple[Positive, ...] = ()  # multiscale: rising sides, the last that of the latent grid; (): as VAR


class ModelConfig(Section):
    """image -> encoder -> quantizer -> decoder -> image."""

    encoder_cls: EncoderClass = "Dinov2withNorm"
    # Hub id or local folder with config.json, preprocessor_config.json and safetensors weights. None: nothing is
    # loaded, the encoder of `encoder_params.architecture` starts from random weights.
    encoder_config_path: str | None = "facebook/dinov2-base"
    encoder_params: EncoderParams = EncoderParams()
    encoder_input_size: Positive = 224  # pixels; images of another size are resized bicubically
    decoder_config_path: str = "vit_mae-base"  # ViT-S, ViT-B, ViT-L, ViT-XL, a folder or a hub id
    decoder_patch_size: Positive = 16  # pixels; the output is latent grid * decoder_patch_size
    decoder_train_pos_embed: bool = False  # the origin calls its table fixed and trains it; here fixed means fixed
    pretrained_decoder_path: str | None = None  # a decoder to start from
    decoder_features: tuple[int, ...] = ()  # encoder blocks whose tokens an extra head of the decoder predicts
    noise_tau: NonNegative = 0.0  # latent noise in training: sigma = noise_tau * uniform(0, 1) per image
    reshape_to_2d: bool = True  # latents [B, h, w, C]; False: [B, N, C]
    normalization_stat_path: str | None = None  # .npz or .pt: mean and/or var of the latents, principal axes
    # none: the continuous autoencoder RAE
    quantizer: Literal[
        "ema", "simvq", "fsq", "lfq", "bsq", "gumbel", "ibq", "residual", "product", "multiscale", "none"
    ] = "ema"
    quantizer_params: QuantizerParams = QuantizerParams()
    num_embeddings: Positive = 8192  # codebook size K; fsq: what its levels make
    commitment_cost: NonNegative = 0.25  # all but fsq, where it is 1, and gumbel
    vq_decay: Decay = 0.99  # ema
    vq_epsilon: Above0 = 1e-5  # ema
    quantize_before_reshape: bool = False  # True: indices [B, N]; False: [B, h, w]
    # ema, simvq, gumbel, ibq: first codes by k-means of the first batch, tokens of the first batch, or random (as in
    # the papers and the origin)
    codebook_init: Literal["kmeans", "data", "normal"] = "kmeans"
    revival_threshold: NonNegative = 0.2  # share of the mean EMA count below which a code is revived; 0: never
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters, distances and losses stay float32
    # cudnn: NVIDIA's fused kernel on GPUs, for dtype bfloat16; pallas: ours on TPUs; elsewhere both are as xla. Not
    # measured.
    attention: Literal["xla", "cudnn", "pallas"] = "xla"
    # Blocks of the decoder and of frozen ViTs stacked and scanned: fast to compile, and fast on a CPU, where XLA else
    # computes the gradient of the residual stream anew in every block.
    scan_layers: bool = True
    remat: bool = False  # recompute decoder blocks in the backward pass: less memory, about a third more FLOPs

    @pydantic.model_validator(mode="after")
    def _the_fused_kernel_has_its_dtype(self):
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise ValueError(
                f"attention='cudnn' is NVIDIA's kernel for dtype='bfloat16', not dtype={self.dtype!r}: set "
                "model.dtype='bfloat16', or model.attention='xla'"
            )
        return self


class DataConfig(Section):
    """Where images come from and what a batch is."""

    source: Literal["photographs", "folder", "webdataset", "parquet", "tfds"] = "folder"
    # Here or in a bucket (gs://, s3://). folder: images, flat or in class subfolders; webdataset: .tar shards, and
    # parquet: .parquet or .arrow files with encoded images: a folder, a file or a pattern as in "data/train-*.tar";
    # tfds: data_dir or prepared folder.
    path: str | None = None
    eval_path: str | None = None  # all but tfds: validation images, named like path; none means no evaluation
    name: str | None = None  # tfds: the dataset's name, as in "imagenet2012"; not needed for a prepared folder
    train_split: str = "train"  # tfds split expressions
    eval_split: str = "validation"
    image_size: Positive = 256  # pixels, square
    # random: short side to image_size * resize, then a random square; adm: guided-diffusion's random crop
    crop: Literal["random", "center", "adm"] = "random"
    eval_crop: Literal["center", "adm"] = "center"  # adm: guided-diffusion's centre crop
    resize: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0  # times image_size: short side before the crop
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


class PerceptualConfig(Section):
    """A distance between what a frozen network sees in two pictures."""

    # lpips; convnext: logits of a classifier; encoder: patch tokens of any encoder that the model section can name
    network: Literal["lpips", "convnext", "encoder"] = "lpips"
    weight: NonNegative = 0.0  # 0: off, nothing is read
    start_steps: Count = 0  # steps before it counts
    start_epochs: Epochs = None
    trunk: str = "timm/vgg16.tv_in1k"  # lpips: VGG16; a hub id, or a file
    heads: str = "chaofengc/IQA-PyTorch-Weights/LPIPS_v0.1_vgg-a78928a0.pth"  # lpips: version 0.1
    path: str | None = None  # convnext, encoder: hub id or folder; encoder, None: random weights of `architecture`
    encoder_cls: EncoderClass = "Dinov2withNorm"  # encoder
    architecture: dict[str, Any] = {}  # encoder without pretrained weights: as in encoder_params
    layers: tuple[int, ...] = (-1,)  # encoder: blocks that are compared
    input_size: Positive = 224  # convnext, encoder: pixels
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations


class LossConfig(Section):
    """Terms of the tokenizer's loss; a weight of 0 switches one off."""

    pixel: Literal["l1", "l2"] = "l1"
    pixel_weight: NonNegative = 1.0
    vq_weight: NonNegative = 1.0
    perceptual: PerceptualConfig = PerceptualConfig()
    feature_weight: NonNegative = 0.0  # of the decoder's guess at the frozen encoder's model.decoder_features
    feature_distance: Literal["cosine", "l2"] = "cosine"
    distill_weight: NonNegative = 0.0  # holds an encoder that trains to the latents of its frozen copy
    distill_distance: Literal["cosine", "l2"] = "l2"


Figure = Literal["lpips", "inception", "encoder", "linear_probe"]


class EvaluationConfig(Section):
    """What is measured on the validation images beside PSNR, SSIM and the use of the codes.

    inception and encoder give Frechet, kernel and paired distances in their features, inception its score as well;
    lpips reads the files that loss.perceptual names as trunk and heads.
    """

    metrics: tuple[Figure, ...] = ("linear_probe",)  # by --mode=evaluate
    training_metrics: tuple[Figure, ...] = ()  # by each evaluation inside training
    images: Positive | None = None  # the first of the validation images; None: all
    # File pt_inception-2015-12-05-6726825d.pth of pytorch-fid or torch-fidelity, or its tensors as safetensors or npz.
    inception_path: str | None = None
    # Besides the validation images themselves (rFID): .npz with mu and sigma, or a folder of images.
    inception_reference: str | None = None
    encoder_cls: EncoderClass = "Dinov2withNorm"
    encoder_path: str = "facebook/dinov2-large"  # hub id or local folder; this one is FD-DINOv2
    encoder_input_size: Positive = 224  # pixels
    encoder_pool: Literal["cls", "mean"] = "cls"  # the class token, or the mean of the patch tokens
    encoder_reference: str | None = None
    kernel_images: Annotated[int, Field(ge=2)] = 5_000  # the kernel distance compares all pairs of at most so many
    examples: Positive = 4  # in each of the rows best, median and worst of the page


class AdamWConfig(Section):
    """AdamW and its schedule; steps are optimizer steps, epochs passes over the training images in place of them."""

    learning_rate: Above0 = 2e-4
    final_learning_rate: NonNegative = 2e-5
    reference_batch: Positive | None = None  # the rates above are for this batch; scaled by data.batch_size over it
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Count = 0
    warmup_epochs: Epochs = None
    decay_end_steps: Count | None = None  # None: train.steps
    decay_end_epochs: Epochs = None
    b1: Decay = 0.9
    b2: Decay = 0.95
    weight_decay: NonNegative = 0.0  # on kernels only
    clip_norm: NonNegative = 0.0  # global gradient norm; 0 switches clipping off


class AdversaryConfig(Section):
    """A discriminator and the term it adds to the tokenizer's loss."""

    discriminator: Literal["none", "dino", "patch"] = "none"
    weight: NonNegative = 0.75
    adaptive: bool = True  # weight times the ratio of both gradients at the decoder's last layer
    adaptive_max: Above0 = 1e4
    start_steps: Count = 0  # steps before the discriminator trains
    start_epochs: Epochs = None
    generator_start_steps: Count = 0  # steps before the decoder is to fool it
    generator_start_epochs: Epochs = None
    disc_updates: Positive = 1  # per step of the tokenizer
    loss: Literal["hinge", "vanilla"] = "hinge"
    generator_loss: Literal["vanilla", "non_saturating"] = "vanilla"  # vanilla: minus the mean logit
    lecam_weight: NonNegative = 0.0
    lecam_decay: Decay = 0.999
    augment: Fraction = 1.0  # probability of each of DiffAug's translation, colour and cutout
    cutout: Fraction = 0.0  # side of the cutout relative to the picture
    path: str = "facebook/dino-vits8"  # dino: hub id, folder, or file of DINO's authors
    trunk_heads: Positive | None = None  # dino: attention heads; None: one per 64 channels
    taps: tuple[Count, ...] = (2, 5, 8, 11)  # dino: blocks with a head, beside the last
    window: Positive = 9  # dino: tokens that a head's convolution spans
    norm: Literal["batch", "group"] = "batch"  # over each picture by itself
    spectral: bool = True  # spectral normalization
    width: Positive = 64  # patch: channels of the first layer
    layers: Positive = 3  # patch
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations
    optimizer: AdamWConfig = AdamWConfig()  # its steps and epochs count from start_steps on


class OptimizerConfig(AdamWConfig):
    """That of the tokenizer."""

    encoder_rate: NonNegative = 1.0  # learning rate of a part relative to the schedule
    quantizer_rate: NonNegative = 1.0
    decoder_rate: NonNegative = 1.0
    constant: tuple[Part, ...] = ()  # parts whose rate stays where warm-up left it
    accumulate: Positive = 1  # micro-batches per optimizer step
    ema_decay: Decay = 0.9978  # of the parameters
    ema_warmup: bool = True  # the decay of step t is at most (1 + t) / (10 + t), so that short runs forget their start


class TrainConfig(Section):
    """The run."""

    steps: Positive = 100_000
    # Passes over the training images, in place of steps; but steps of the command line go before a file's epochs.
    epochs: Epochs = None
    seed: Count = 0
    trainable: tuple[Part, ...] = ("quantizer", "decoder")
    # Workdir or checkpoint of another run: a new run starts from its EMA parameters and codebook, at step 0.
    start_from: str | None = None
    start_parts: tuple[Part, ...] = ()  # what is taken of it; (): all that it has
    start_renames: dict[str, str] = {}  # beginning of a path in that checkpoint -> what it is called here
    log_every: Positive = 50
    evaluate_every: Positive = 5_000
    checkpoint_every: Positive = 1_000
    keep_last: Positive = 3
    keep_best: Count = 1  # by validation PSNR
    codebook_alarm: Fraction = 0.1  # warn when a window of the log uses a smaller share of the codes; 0: never
    keep_every: Count = 0  # steps; checkpoints of their multiples are kept for good; 0: none
    hang_seconds: NonNegative = 900  # without a step, after which every thread's stack is printed; 0: never
    log_images: Positive = 8  # validation images drawn at each evaluation
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
    adversary: AdversaryConfig = AdversaryConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
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

    @pydantic.model_validator(mode="after")
    def _terms_have_what_they_need(self):
        loss, adversary = self.loss, self.adversary
        if loss.feature_weight and not self.model.decoder_features:
            raise ValueError(
                f"loss.feature_weight={loss.feature_weight} needs model.decoder_features, the encoder blocks to predict"
            )
        if loss.distill_weight and "encoder" not in self.train.trainable:
            raise ValueError(
                f"loss.distill_weight={loss.distill_weight} is for an encoder that trains, and "
                f"train.trainable={self.train.trainable} has none"
            )
        if adversary.discriminator != "none" and adversary.adaptive and "decoder" not in self.train.trainable:
            raise ValueError(
                f"adversary.adaptive weighs gradients of the decoder, which train.trainable={self.train.trainable} "
                "leaves as it is: set adversary.adaptive=False"
            )
        return self
