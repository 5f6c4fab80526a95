"""A small VQRAE on the photographs that scikit-image and scikit-learn ship: two CPU cores, two to four minutes.

Nothing is downloaded: a small ViT encoder starts from random weights and trains together with the codebook and the
decoder. The smallest recipe with a pretrained encoder is configs/small.py. Target: 25 dB PSNR on two held-out
photographs at 64 x 64 pixels, and more than half of the codebook in use. Muon, overlapping squares, low-dimensional
codes and the loss of edges were measured in small only, see docs/train.md.
"""

from vqrae_jax import config


def get_config():
    c = config.defaults()
    c.model.encoder_config_path = None
    c.model.encoder_params.architecture = {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "patch_size": 4,
        "image_size": 64,
    }
    c.model.encoder_input_size = 64
    c.model.decoder_config_path = "ViT-Nano"
    c.model.decoder_patch_size = 4
    c.model.decoder_head = "overlap"
    c.model.num_embeddings = 1024
    c.model.quantizer_params.codebook_dim = 16
    c.model.vq_decay = 0.95  # the codebook must follow the encoder, which trains

    c.data.source = "photographs"
    c.data.image_size = 64
    c.data.scale = (1.5, 7.0)
    c.data.batch_size = 16
    c.data.eval_batch_size = 64

    c.loss.gradient_weight = 1.0
    c.optimizer.method = "muon"
    c.optimizer.learning_rate = 4e-3
    c.optimizer.final_learning_rate = 1e-5
    c.optimizer.warmup_steps = 50
    c.optimizer.clip_norm = 1.0
    c.optimizer.ema_decay = 0.99

    c.train.steps = 400
    c.train.trainable = ("encoder", "quantizer", "decoder")
    c.train.log_every = 25
    c.train.evaluate_every = 200
    c.train.checkpoint_every = 200
    return c
