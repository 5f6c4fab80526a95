"""The defaults of every field, from which the other configs start.

The fields, their meaning and their accepted values are in `docs/config.md`. Any field can be set on the
command line: --config.model.num_embeddings=16384.
"""

from vqrae_jax import config


def get_config():
    return config.defaults()
