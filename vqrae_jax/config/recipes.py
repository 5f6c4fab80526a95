"""Groups of settings that several config files share."""

import ml_collections


def rae_stage1(c: ml_collections.ConfigDict, epochs: float = 16) -> None:
    """The losses and the schedule of RAE's decoders (Zheng et al. 2025, arXiv:2510.11690): L1, LPIPS, DINO adversary.

    The discriminator starts after 6 of 16 epochs and the decoder has to fool it after 8; other lengths in proportion.
    """
    c.train.epochs = epochs
    c.data.batch_size = 512
    c.loss.perceptual.weight = 1.0
    c.adversary.discriminator = "dino"
    c.adversary.weight = 0.75
    c.adversary.start_epochs = epochs * 6 / 16
    c.adversary.generator_start_epochs = epochs * 8 / 16
    c.optimizer.warmup_epochs = epochs / 16
    c.adversary.optimizer.warmup_epochs = epochs / 16


def half_precision(c: ml_collections.ConfigDict) -> None:
    """bfloat16 activations wherever there is a choice; parameters, norms, distances and losses stay float32."""
    c.model.dtype = c.loss.perceptual.dtype = c.adversary.dtype = "bfloat16"
