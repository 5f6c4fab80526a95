"""Second stage: trains the decoder of a tokenizer further, on frozen codes of which some are replaced by near ones.

--config=configs/finetune_decoder.py --checkpoint=TOKENIZER names the tokenizer, whose model section replaces that of
this file. Encoder and codebook are frozen and keep their dtype, so that datasets of codes and generators remain valid.
Replaced codes stand for the errors of a generator; evaluation has none.

| | RobusTok (Qiu et al. 2025, arXiv:2503.08354, arXiv:2509.12474, and its code) | this config |
| --- | --- | --- |
| codes are replaced | while encoder, codebook and decoder train | while only the decoder trains |
| replaced codes | all of 10 % of the images, fewer later | of each image a share from 0 to 20 %, 10 % on average |
| by | one of the 100 nearest codes to the latent, itself among them | one of the 100 nearest other codes |
| second stage | decoder only, on codes that a generator sampled next to true ones | decoder only, on true codes |
| rates of decoder and discriminator | from 5e-5, cosine | equal, to 5e-6 |

Images, L1, LPIPS and the DINO discriminator with LeCam are those of configs/recipe_16k.py. The discriminator starts
without training and has the first of 10 epochs alone; epochs and batch size are ours. Not run at full size.

Requires --config.data.path, and the hub (or local paths) for the weights of the encoder, VGG16, the LPIPS heads and
DINO; reading .pth files requires the torch extra.
Hardware (estimate, not run at full size): for a tokenizer of configs/recipe_16k.py at most a fifth of its 83 exaFLOP; 2
hours on 8 H100 at 30 % of the peak.
"""

from vqrae_jax import config
from vqrae_jax.config import recipes


def get_config():
    c = config.defaults()
    recipes.discrete_rae(c, epochs=10.0)
    c.model.decoder_features, c.loss.feature_weight = (), 0.0  # not every tokenizer has this head
    c.train.trainable = ("decoder",)
    c.train.code_noise = 0.2
    c.train.code_neighbors = 100
    c.adversary.start_epochs = 0.0
    c.adversary.generator_start_epochs = 1.0
    for optimizer in (c.optimizer, c.adversary.optimizer):
        optimizer.learning_rate, optimizer.final_learning_rate = 5e-5, 5e-6
    return c
