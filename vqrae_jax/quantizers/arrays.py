"""Annotations of arrays that most files of this package use."""

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

AnyArray = jax.Array | np.ndarray  # what public functions accept

Rows = Float[AnyArray, "N C"]  # latents
Codebook = Float[AnyArray, "K C"]
PerEmbedding = Float[AnyArray, " K"]
PerRow = Float[AnyArray, " N"]
Mask = Bool[AnyArray, " N"]  # rows that count
Indices = Int[AnyArray, " N"]
Nearest = tuple[Indices, PerRow]  # of a search, with distances or scores
Scalar = Float[Array, ""]
