"""Every default. The fields, what they mean and what they accept are in `vqrae_jax/config/schema.py`; other
configs start from this one and say what differs. Any field can be overridden: --config.model.num_embeddings=16384.
"""

from vqrae_jax import config


def get_config():
    return config.defaults()
