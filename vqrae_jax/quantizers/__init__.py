"""Quantizers as Flax layers; importing this package registers all of them.

Modules from [*b, C] to indices and back. They know nothing of images, configs or meshes.
"""

from vqrae_jax.quantizers.base import Quantized, Quantizer
from vqrae_jax.quantizers.ema import EMAQuantizer
from vqrae_jax.quantizers.fsq import FSQ
from vqrae_jax.quantizers.fusion import Fused
from vqrae_jax.quantizers.gumbel import GumbelQuantizer
from vqrae_jax.quantizers.ibq import IBQ
from vqrae_jax.quantizers.lfq import LFQ
from vqrae_jax.quantizers.multiscale import MultiScale
from vqrae_jax.quantizers.none import NoQuantizer
from vqrae_jax.quantizers.product import Product
from vqrae_jax.quantizers.residual import Residual
from vqrae_jax.quantizers.simvq import SimVQ
from vqrae_jax.quantizers.vq import VQ
from vqrae_jax.quantizers.wrappers import Projected, Whitened
