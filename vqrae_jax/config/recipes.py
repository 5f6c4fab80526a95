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


def half_precision(c: ml_collections.ConfigDict) -> None:
    """bfloat16 activations wherever there is a choice; parameters, norms, distances and losses stay float32."""
    c.model.dtype = c.loss.perceptual.dtype = c.adversary.dtype = "bfloat16"
