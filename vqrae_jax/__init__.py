"""VQRAE: vector-quantized representation autoencoders in JAX."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqrae_jax.config import ModelConfig
    from vqrae_jax.inference.generator import Generator
    from vqrae_jax.inference.tokenizer import Tokenizer
    from vqrae_jax.models.vqrae import VQRAE

__version__ = "0.1.0"
__all__ = ["VQRAE", "Generator", "ModelConfig", "Tokenizer", "__version__"]

_MODULES = {
    "Generator": "vqrae_jax.inference.generator",
    "ModelConfig": "vqrae_jax.config",
    "Tokenizer": "vqrae_jax.inference.tokenizer",
    "VQRAE": "vqrae_jax.models.vqrae",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that importing the package starts nothing."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
