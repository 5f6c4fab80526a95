"""The released continuous RAE on DINOv2-B with registers and its ViT-XL decoder; no quantizer.

The default image size is 256 pixels; --config=configs/rae_dinov2_b.py:512 selects the release for 512 pixels.
Training continues from the released decoder with the losses, the noise and the schedule of RAE, see
`vqrae_jax.config.recipes.rae_stage1`; --config.model.pretrained_decoder_path="" starts from a random one, as RAE did.
The released files are in PyTorch format; reading them requires the torch extra.
"""

from vqrae_jax import config
from vqrae_jax.config import recipes
from vqrae_jax.errors import ConfigError

REPOSITORY = "nyu-visionx/RAE-collections"
RELEASED = {
    "256": ("decoders/dinov2/wReg_base/ViTXL_n08/model.pt", "stats/dinov2/wReg_base/imagenet1k/stat.pt"),
    "512": ("decoders/dinov2/wReg_base/ViTXL_n08_i512/model.pt", "stats/dinov2/wReg_base/imagenet1k_512/stat.pt"),
}  # fmt: skip


def get_config(pixels="256"):
    if pixels not in RELEASED:
        raise ConfigError(f"decoders were released for {' and '.join(RELEASED)} pixels", field="--config", value=pixels)
    decoder, statistics = RELEASED[pixels]
    c = config.defaults()
    c.model.encoder_cls = "Dinov2withNorm"
    c.model.encoder_config_path = "facebook/dinov2-with-registers-base"
    c.model.encoder_input_size = int(pixels) // 16 * 14
    c.model.decoder_config_path = "ViT-XL"
    c.model.pretrained_decoder_path = f"{REPOSITORY}/{decoder}"
    c.model.normalization_stat_path = f"{REPOSITORY}/{statistics}"
    c.model.quantizer = "none"
    c.model.noise_tau = 0.8
    recipes.rae_stage1(c)
    c.data.image_size = int(pixels)
    return c
