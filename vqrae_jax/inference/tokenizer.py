"""A trained tokenizer for use: images -> codes -> images."""

import functools
import os
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from vqrae_jax import assembly, checkpoint
from vqrae_jax import config as config_lib
from vqrae_jax.inference import folder as exported
from vqrae_jax.models.encoder import at_input_size
from vqrae_jax.models.vqrae import VQRAE

PARTS = ("encoder", "quantizer", "decoder")
METHODS = ("__call__", "encode", "decode", "encode_to_indices", "decode_from_indices")


class TokenizerError(ValueError):
    """What was given is no picture or no code of this tokenizer."""


class Tokenizer:
    """Encodes images to codes and paints codes, in batches of any size; each new shape is compiled once.

    Images are numpy or jax arrays [B, H, W, 3], floats in [0, 1] or uint8, of any size: the encoder sees them resized
    to its input size. Results are numpy arrays; pictures are floats in [0, 1], [B, S, S, 3] with S = image_size.
    """

    def __init__(self, module: VQRAE, variables: dict[str, Any]):
        """
        Args:
          module: the model.
          variables: {"params": ..., "batch_stats": ...} with all of its parts, on any device or mesh.
        """
        self.module, self.variables = module, variables
        image = jax.ShapeDtypeStruct((1, self.image_size, self.image_size, 3), np.float32)
        self._quantized = jax.eval_shape(functools.partial(module.apply, method="quantize"), variables, image)
        self._compiled = {m: jax.jit(functools.partial(module.apply, method=m)) for m in METHODS}

    @classmethod
    def load(cls, path: str | os.PathLike, step: int | None = None) -> "Tokenizer":
        """Reads a run's workdir (its newest checkpoint, or that of `step`), one checkpoint, or an exported folder.

        The frozen encoder is not in a checkpoint: it is read from where the config says.

        Raises:
          CheckpointError: nothing complete is there, or it is of another architecture than its config.
          PretrainedError: the encoder's weights cannot be had.
        """
        module, variables = read_model(path, step)
        encoder, params = at_input_size(module.encoder, variables["params"]["encoder"])
        variables = {**variables, "params": {**variables["params"], "encoder": params}}
        return cls(module.clone(encoder=encoder), jax.device_put(variables, jax.devices()[0]))

    @property
    def codebook_size(self) -> int:
        """K, the number of codes; of several levels or groups, of each."""
        if "counts" not in self._quantized.metrics:
            raise TokenizerError("this is a continuous autoencoder (quantizer='none'): it has no codes")
        return self._quantized.metrics["counts"].shape[-1]

    @property
    def grid(self) -> int:
        """Side of the code grid: a picture is grid * grid codes."""
        return self.module.encoder.grid

    @property
    def image_size(self) -> int:
        """Side in pixels of the pictures it paints."""
        return self.module.decoder.image_size

    def encode(self, images: Float[Array, "B H W 3"]) -> Float[np.ndarray, "B h w C"]:
        """Quantized latents, as `decode` takes them."""
        return self._run("encode", check_images(images))

    def decode(self, latents: Float[Array, "B h w C"]) -> Float[np.ndarray, "B S S 3"]:
        """Paints latents of `encode`."""
        return np.clip(self._run("decode", np.asarray(latents)), 0, 1)

    def encode_to_indices(self, images: Float[Array, "B H W 3"]) -> Int[np.ndarray, "B h w"]:
        """Codes in [0, codebook_size), int32; [B, h*w] for a tokenizer with quantize_before_reshape."""
        return self._run("encode_to_indices", check_images(images))

    def decode_from_indices(self, indices: Int[Array, "B h w"]) -> Float[np.ndarray, "B S S 3"]:
        """Paints codes."""
        return np.clip(self._run("decode_from_indices", self._check_indices(indices)), 0, 1)

    def reconstruct(self, images: Float[Array, "B H W 3"]) -> Float[np.ndarray, "B S S 3"]:
        """decode_from_indices(encode_to_indices(images)) in one pass."""
        return np.clip(self._run("__call__", check_images(images)), 0, 1)

    def _run(self, method: str, x: np.ndarray) -> np.ndarray:
        return np.asarray(self._compiled[method](self.variables, x))

    def _is_prefix(self, given: tuple[int, ...], whole: tuple[int, ...]) -> bool:
        """Codes of several levels decode from their first levels alone, coarse to fine."""
        same = len(given) == len(whole) and given[:-1] == whole[:-1]
        return same and 0 < given[-1] < whole[-1] and getattr(self.module.quantizer, "decodes_prefixes", False)

    def _check_indices(self, indices: Any) -> np.ndarray:
        indices = np.asarray(indices)
        if not np.issubdtype(indices.dtype, np.integer):
            raise TokenizerError(f"indices are {indices.dtype}; codes are integers in [0, {self.codebook_size})")
        shape = self._quantized.indices.shape[1:]
        if indices.shape[1:] != shape and not self._is_prefix(indices.shape[1:], shape):
            raise TokenizerError(f"indices have shape {indices.shape}; expected [B, {', '.join(map(str, shape))}]")
        if indices.size and not 0 <= indices.min() <= indices.max() < self.codebook_size:
            raise TokenizerError(
                f"indices span [{indices.min()}, {indices.max()}]; the codes are 0 to {self.codebook_size - 1}"
            )
        return indices.astype(np.int32)


def read_model(path: str | os.PathLike, step: int | None = None) -> tuple[VQRAE, dict[str, Any]]:
    """The module and its variables as they were trained and are exported; arguments and errors as `Tokenizer.load`."""
    if exported.is_folder(path):
        return exported.read(path)
    folder = checkpoint.find(path, step)
    config = config_lib.from_dict(config_lib.Config, checkpoint.read_meta(folder)["config"])
    saved = checkpoint.saved_shapes(folder)
    settings = config.model
    if "decoder" in config.train.trainable:  # what it started from may be gone by now
        settings = settings.model_copy(update={"pretrained_decoder_path": None})
    built = assembly.assemble(settings, latent_stats=saved["batch_stats"].get("latent", {}))
    shapes = assembly.shapes(built)
    trained = {n: p for n, p in shapes["params"].items() if n in config.train.trainable or n in saved["params"]}
    checkpoint.check_shapes(saved, {**shapes, "params": trained}, folder)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), saved)
    model = checkpoint.read_model(folder, target)
    key = jax.random.key(config.train.seed)
    frozen = assembly.initial_params(built, key, [n for n in PARTS if n not in trained])
    return built.module, {**model, "params": {**frozen, **model["params"]}}


def check_images(images: Any) -> np.ndarray:
    """Images as float32 in [0, 1].

    Raises:
      TokenizerError: wrong rank, channels, type or range, with what to do about it.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape[1:]:
        hint = "add a batch axis: images[None]" if images.ndim == 3 else "channels come last, three of them"
        raise TokenizerError(f"images have shape {images.shape}; expected [B, H, W, 3] ({hint})")
    if images.dtype == np.uint8:
        return images.astype(np.float32) / 255
    # bfloat16 is no np.floating; what converts to float without being an integer or a bool is one here.
    if images.dtype.kind not in "fV":
        raise TokenizerError(f"images are {images.dtype}; expected uint8, or floats in [0, 1]")
    images = images.astype(np.float32)
    if images.size and not (images.min() >= 0 and images.max() <= 1):
        raise TokenizerError(
            f"images span [{images.min():.3g}, {images.max():.3g}]; floats are in [0, 1]: divide by 255, or undo a "
            f"normalization, before"
        )
    return images
