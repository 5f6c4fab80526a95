"""VQRAE: vector-quantized representation autoencoders in JAX."""

__version__ = "0.1.0"
