"""VQRAE: vector-quantized representation autoencoders in JAX."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["VQRAE", "Tokenizer", "__version__"]


def __getattr__(name: str) -> Any:
    """The public names, imported when they are first used: importing the package starts nothing."""
    if name == "VQRAE":
        from vqrae_jax.models.vqrae import VQRAE

        return VQRAE
    if name == "Tokenizer":
        from vqrae_jax.inference.tokenizer import Tokenizer

        return Tokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
