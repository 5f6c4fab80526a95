"""Groups of settings that several config files share."""

import ml_collections


def rae_stage1(c: ml_collections.ConfigDict, epochs: float = 16) -> None:
    """Sets data, losses and schedule of RAE's decoders (Zheng et al. 2025, arXiv:2510.11690) as its repository does.

    Random crops of images of 1.5 times the size, not mirrored; L1, LPIPS and a DINO discriminator, which starts after 6
    of 16 epochs and which the decoder has to fool after 8; other lengths in proportion. Optimizers, their rates and the
    moving average have RAE's settings by default. Differences that remain:

    | | RAE | this recipe |
    | --- | --- | --- |
    | noise of the latents | `noise_tau` 0.8 | 0, which rae_*.py change: a codebook has no need of it |
    | position table of the decoder | trains, although it is called fixed | fixed sines and cosines |
    | reconstructions for the discriminator | decoded again after the step | those of the step, see docs/train.md |
    | moving average | constant decay | smaller decay in the first 4,000 steps |
    """
    c.train.epochs = epochs
    c.data.batch_size = 512
    c.data.resize = 1.5
    c.data.flip = False
    c.loss.perceptual.weight = 1.0
    c.adversary.discriminator = "dino"
    c.adversary.weight = 0.75
    c.adversary.start_epochs = epochs * 6 / 16
    c.adversary.generator_start_epochs = epochs * 8 / 16
    c.optimizer.warmup_epochs = epochs / 16
    c.adversary.optimizer.warmup_epochs = epochs / 16
    c.adversary.optimizer.decay_end_epochs = epochs  # of training of the discriminator, which the run does not reach


def discrete_rae(c: ml_collections.ConfigDict, epochs: float) -> None:
    """Sets networks, data, losses and schedule of the recommended tokenizers for ImageNet; the codebook is theirs.

    | part | source |
    | --- | --- |
    | frozen DINOv2-B with registers, ViT-XL decoder for 256 pixels | RAE (Zheng et al. 2025, arXiv:2510.11690) |
    | L1, LPIPS, adaptive DINO adversary, their weights, optimizers and schedule | RAE, see `rae_stage1` |
    | the latent: three layers, weighted per token | after DRoRAE (Zhu et al. 2026, arXiv:2605.10780), simpler |
    | the decoder predicts a middle and the last layer of the encoder | after VFMTok (arXiv:2507.08441) |
    | LeCam | Tseng et al. 2021, arXiv:2104.03310 |
    | crops and flips | ADM (Dhariwal & Nichol 2021, arXiv:2105.05233) |
    | decoder with overlapping squares, clipping, constant rate of the quantizer | ours |

    Overlapping squares, shallow layers and routed fusion were measured in small only, see docs/train.md, and the weight
    of the features, 0.5, was not. Muon and the gradient loss, which were measured there as well, are left out: their
    rates and weights would have to be found again for an adversary.
    """
    c.model.encoder_cls = "Dinov2withNorm"
    c.model.encoder_config_path = "facebook/dinov2-with-registers-base"
    c.model.encoder_params.layers = (2, 6, -1)
    c.model.encoder_params.fusion = "routed"
    c.model.encoder_input_size = 224
    c.model.decoder_config_path = "ViT-XL"
    c.model.decoder_head = "overlap"
    c.model.decoder_features = (6, -1)
    c.model.remat = True
    c.loss.feature_weight = 0.5
    rae_stage1(c, epochs)
    half_precision(c)
    c.optimizer.constant = ("quantizer",)
    c.optimizer.clip_norm = 1.0
    c.adversary.lecam_weight = 0.001
    c.data.crop, c.data.resize, c.data.flip = "adm", 1.0, True


def half_precision(c: ml_collections.ConfigDict) -> None:
    """bfloat16 activations wherever there is a choice; parameters, norms, distances and losses stay float32."""
    c.model.dtype = c.loss.perceptual.dtype = c.adversary.dtype = "bfloat16"


def imagenet_generator(c: ml_collections.ConfigDict, num_embeddings: int) -> None:
    """Sets a generator of ImageNet's 1,000 classes on the 16 x 16 codes of a tokenizer with `num_embeddings` codes.

    The shape of the codes is set so that it is known without data; other codes need other values.
    """
    c.train.task = "generator"
    c.data.source = "codes"
    c.generator.grids = ((16, 16),)
    c.generator.levels = 1
    c.generator.num_embeddings = num_embeddings
    c.generator.classes = 1000
    c.generator.dtype = "bfloat16"
    c.optimizer.clip_norm = 1.0
    c.optimizer.ema_decay = 0.9999


def masked_generator(c: ml_collections.ConfigDict, width: int, depth: int, heads: int, mlp: int) -> None:
    """Sets network and sampler of Halton-MaskGIT (Besnier et al. 2025, arXiv:2503.17076), and a schedule of our own.

    Network, dropout, masks, rate, warm-up and clipping are those of its repository, with our initialization, norms and
    head; batch and epochs are ours.
    """
    imagenet_generator(c, 16_384)
    c.generator.width, c.generator.depth, c.generator.heads, c.generator.mlp = width, depth, heads, mlp
    c.generator.gated = True
    c.generator.adaln = True
    c.generator.class_token = False
    c.generator.registers = 1
    c.generator.schedule = "arccos"
    c.generator.sampler.method = "halton"
    c.generator.sampler.steps = 32
    c.generator.sampler.schedule = "arccos"
    c.generator.sampler.guidance = 2.0
    c.generator.sampler.guidance_schedule = "linear"
    c.train.epochs = 300
    c.data.batch_size = 256
    c.optimizer.learning_rate = 1e-4
    c.optimizer.final_learning_rate = 1e-5
    c.optimizer.warmup_steps = 2500
    c.optimizer.weight_decay = 0.03
    c.optimizer.b2 = 0.96


def rar_generator(c: ml_collections.ConfigDict, width: int, mlp: int) -> None:
    """Sets network, schedule and orders of RAR (Yu et al. 2024, arXiv:2411.00776) as its repository does.

    400 epochs with batches of 2,048: all orders random in the first 200, fewer until 300, then row by row. Differences
    that remain: the number of codes (1,024 in RAR), the head, the average of the parameters (none in RAR), and the
    dropout of attention weights, which RAR has in addition.
    """
    imagenet_generator(c, 16_384)
    c.generator.family = "autoregressive"
    c.generator.width, c.generator.depth, c.generator.heads, c.generator.mlp = width, 24, 16, mlp
    c.generator.adaln = True
    c.generator.tied = False
    c.generator.permuted_epochs = 200
    c.generator.raster_epochs = 300
    c.generator.sampler.guidance_schedule = "power-cosine"
    c.train.epochs = 400
    c.data.batch_size = 2048
    c.optimizer.learning_rate = 4e-4
    c.optimizer.final_learning_rate = 1e-5
    c.optimizer.warmup_epochs = 100
    c.optimizer.weight_decay = 0.03
    c.optimizer.b2 = 0.96
