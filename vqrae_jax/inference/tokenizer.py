"""A trained tokenizer for use: images -> codes -> images."""

import functools
import hashlib
import json
import math
import numbers
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, get_args

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from vqrae_jax import config as config_lib
from vqrae_jax import sharding, storage
from vqrae_jax.errors import DataError
from vqrae_jax.inference import batching as programs
from vqrae_jax.inference import card
from vqrae_jax.inference import saving as exported
from vqrae_jax.inference.inputs import Fit, Pictures, as_numpy
from vqrae_jax.inference.location import locate, read_model
from vqrae_jax.models.vqrae import VQRAE
from vqrae_jax.pretrained import writers
from vqrae_jax.quantizers.none import NO_CODES

__all__ = ["DataError", "Tokenizer"]

Output = Literal["numpy", "jax"]

METHODS = ("encode", "encode_to_indices", "lookup", "decode", "decode_from_indices")
# Fields of the model section that decide what a code means, beside the weights.
MEANING = (
    "encoder_cls", "encoder_input_size", "quantizer", "num_embeddings", "quantize_before_reshape",
    "encoder_params.normalize", "encoder_params.layers", "encoder_params.fusion",
    "quantizer_params.codebook_dim", "quantizer_params.whitening_dim", "quantizer_params.distance",
    "quantizer_params.levels", "quantizer_params.inner", "quantizer_params.depth", "quantizer_params.groups",
    "quantizer_params.grids",
)  # fmt: skip


class Tokenizer:
    """Encodes images to codes and paints codes.

    Images are an array [B, H, W, 3], a PIL image, or a list of PIL images and arrays [H, W, 3]; arrays are numpy's,
    JAX's or PyTorch's, uint8 or floats in [0, 1], of any size. They are made squares of `image_size` pixels as `fit`
    says. Results are numpy arrays; pictures are floats in [0, 1], [B, S, S, 3] with S = image_size.

    Any number of images goes through in batches of few sizes (powers of two), the last one padded, so that little is
    ever compiled. `module` and `variables` are what runs, with the encoder's position grid at its input size; `trained`
    has the variables as they are in the files.
    """

    def __init__(
        self,
        module: VQRAE,
        variables: dict[str, Any],
        config: config_lib.ModelConfig | None = None,
        *,
        frozen: bool = False,
        provenance: dict[str, Any] | None = None,
        mesh: jax.sharding.Mesh | None = None,
        batch_size: int | None = None,
        memory_limit: int | None = None,
        fit: Fit = "crop",
        output: Output = "numpy",
    ):
        """
        Args:
          module: the model.
          variables: {"params": ..., "batch_stats": ...} with all of its parts, of numpy or on any device or mesh; as
            jax.ShapeDtypeStruct, only the properties work.
          config: the model section that `module` was built from; only to save, and for `hash`.
          frozen: the encoder is the pretrained one that `config` names.
          provenance: what is known of its making, for the model card.
          mesh: where to compute; None: where the variables are. Batches are split over all its axes but "model".
          batch_size: images of every batch; None: powers of two up to 64, as far as `memory_limit` allows.
          memory_limit: bytes that a compiled program may need on a device for its intermediate values; None: half of
            the device's memory.
          fit: what happens to images that are no squares: "crop" takes the central square, "pad" shows all on the mean
            colour, "stretch" changes proportions. All resample bicubically with antialias, to `image_size`. "model"
            leaves images of one size to the encoder's own resizing, as PyTorch VQRAE does (bicubic without antialias).
          output: "jax" leaves results on the device.

        Raises:
          DataError: an option is none of these.
        """
        _check_options(mesh, batch_size, memory_limit, fit, output)
        self.config, self.frozen, self.provenance = config, frozen, provenance or {}
        self.trained, self.mesh = programs.placed(variables, mesh)
        self.module, self.variables = programs.running(module, self.trained)
        self.fit, self.output, self.batch_size, self.memory_limit = fit, output, batch_size, memory_limit
        forward = functools.partial(self.module.apply, method="forward")
        self._quantized = jax.eval_shape(forward, self.variables, self._image_shape(1)).quantized

    @classmethod
    def load(cls, path: str | os.PathLike, step: int | None = None, **options: Any) -> "Tokenizer":
        """Reads a run's workdir (its newest checkpoint, or that of `step`), one checkpoint, an exported folder, or the
        hub id of one.

        The frozen encoder is not in a checkpoint: it is read from where the config says. `options` are those of the
        constructor: mesh, batch_size, memory_limit, fit, output.

        Raises:
          DataError: an option that is none; nothing is read then.
          CheckpointError: nothing complete is there, or it is of another architecture than its config.
          WeightsError: the encoder's weights cannot be had, the folder is damaged, or the hub cannot be reached.
        """
        _check_options(**options)
        found = locate(path, step)
        module, variables = read_model(found, options.get("mesh"))
        known = {"config": found.config, "frozen": found.frozen, "provenance": found.provenance}
        return cls(module, variables, **known, **options)

    from_pretrained = load

    def __repr__(self) -> str:
        codes = f"code_shape={self.code_shape}, codebook_size={self.codebook_size}" if self.has_codes else "no codes"
        return f"Tokenizer(image_size={self.image_size}, {codes})"

    @property
    def has_codes(self) -> bool:
        """False for a continuous autoencoder (quantizer "none"), which only encodes and decodes."""
        return self._quantized.indices is not None

    @property
    def codebook_size(self) -> int:
        """K, the number of codes; of several levels or groups, of each."""
        if not self.has_codes:
            raise DataError(NO_CODES)
        return self._quantized.metrics["counts"].shape[-1]

    @property
    def grid(self) -> int:
        """Side of the code grid: a picture is grid * grid codes."""
        return self.module.encoder.grid

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of the codes of one picture."""
        if not self.has_codes:
            raise DataError(NO_CODES)
        return self._quantized.indices.shape[1:]

    @property
    def code_dtype(self) -> np.dtype:
        """The smallest of uint16 and int32 that holds every code."""
        return np.dtype(np.uint16 if self.codebook_size <= 1 << 16 else np.int32)

    @property
    def bits_per_image(self) -> float:
        """Codes of a picture times log2 of the codebook size."""
        return math.prod(self.code_shape) * math.log2(self.codebook_size)

    @property
    def image_size(self) -> int:
        """Side in pixels of the pictures it paints."""
        return self.module.decoder.image_size

    @property
    def downsampling(self) -> int:
        """Pixels per code, along one side."""
        return self.image_size // self.grid

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of what decides the meaning of a code: encoder, quantizer, and the settings that they read.

        Tokenizers that differ in the decoder alone have the same: they paint the same codes, each in its way.
        """
        if self.config is None:
            raise DataError("a tokenizer without its config has no hash: give config=, or load it from its folder")
        values = self.config.model_dump(mode="json")
        meaning = {name: functools.reduce(dict.__getitem__, name.split("."), values) for name in MEANING}
        trees = {
            f"{kind}/{part}": tree
            for kind, parts in self.trained.items()
            for part, tree in parts.items()
            if part in ("encoder", "quantizer", "latent")
        }
        digest = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode())
        digest.update(writers.content_hash(jax.device_get(trees)).encode())
        return digest.hexdigest()

    def encode(self, images: Any) -> Float[Array, "B h w C"]:
        """Quantized latents, as `decode` takes them."""
        return self._images("encode", images)

    def decode(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B S S 3"]:
        """Paints latents of `encode` or `lookup`."""
        latents = as_numpy(latents).astype(np.float32)
        shape = jax.eval_shape(self.function("encode"), self.variables, self._image_shape(1)).shape
        if latents.shape[1:] != shape[1:]:
            raise DataError(f"latents have shape {latents.shape}; expected [B, {', '.join(map(str, shape[1:]))}]")
        return self._rows("decode", latents)

    def encode_to_indices(self, images: Any) -> Int[Array, "B h w"]:
        """Codes in [0, codebook_size), int32, [B, *code_shape]: [B, h, w], or [B, h*w] with quantize_before_reshape."""
        _ = self.code_shape
        return self._images("encode_to_indices", images)

    def decode_from_indices(self, indices: Int[Array, "B h w"]) -> Float[Array, "B S S 3"]:
        """Paints codes."""
        return self._rows("decode_from_indices", self._check_indices(indices))

    def lookup(self, indices: Int[Array, "B h w"]) -> Float[Array, "B h w C"]:
        """The latents of codes: lookup(encode_to_indices(images)) equals encode(images)."""
        return self._rows("lookup", self._check_indices(indices))

    def reconstruct(self, images: Any) -> Float[Array, "B S S 3"]:
        """Exactly decode_from_indices(encode_to_indices(images)); without codes, decode(encode(images))."""
        if not self.has_codes:
            return self.decode(self.encode(images))
        return self.decode_from_indices(self.encode_to_indices(images))

    def function(self, method: str) -> Callable[[Any, Any], Any]:
        """A pure function (variables, x) -> result for your own jitted code, differentiable where the model is.

        Give it `tokenizer.variables`; images are [B, H, W, 3] floats in [0, 1], pictures are not clipped, and nothing
        is resized, padded or checked.

        Args:
          method: encode, encode_to_indices, lookup, decode or decode_from_indices.
        """
        if method not in METHODS:
            raise DataError(f"no function {method!r}: there are {', '.join(METHODS)}")
        return functools.partial(programs.apply, self.module, method)

    def stream(
        self, method: str, batches: Iterable[Shaped[np.ndarray, "B ..."]]
    ) -> Iterator[Shaped[np.ndarray, "B ..."]]:
        """Results of batches of equal shape, in order; one is computed while the one before is fetched and used.

        Nothing is checked, resized or split: images are [B, S, S, 3], uint8 or float32 in [0, 1].
        """
        return self._programs.stream(method, batches)

    def save_pretrained(self, folder: str | os.PathLike, images: Any = None, name: str | None = None) -> storage.Path:
        """Writes config.json, model.safetensors and a model card to `folder` (here or gs://), for `load` and the hub.

        A frozen pretrained encoder is not in it, only where it is had and what its content hash must be.

        Args:
          folder: made where it is missing.
          images: some to show in the card, beside their reconstructions, with the figures on them.
          name: what the card tells to load; None: the folder.

        Raises:
          DataError: the tokenizer was built without its config.
        """
        if self.config is None:
            raise DataError("a tokenizer without its config cannot be saved: give config=, or load it")
        target, shown = storage.resolve_path(folder), None if images is None else Pictures(images)
        with storage.stage_output(target) as place:
            exported.write(place, self.config, jax.device_get(self.trained), self.frozen, self.provenance)
            card.write(self, place, name or target.name, shown)
        return target

    def push_to_hub(self, repo_id: str, images: Any = None, private: bool = False, token: str | None = None) -> str:
        """Saves it to a repository of the model hub, made where it is missing; returns its address.

        Raises:
          WeightsError: no network, no right to write, or no login.
        """
        return writers.push_to_hub(
            lambda folder: self.save_pretrained(folder, images, repo_id), repo_id, private, token
        )

    @functools.cached_property
    def _programs(self) -> programs.Programs:
        return programs.Programs(self.module, self.variables, self.mesh, self.batch_size, self.memory_limit)

    def _image_shape(self, count: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, self.image_size, self.image_size, 3), np.float32)

    def _images(self, method: str, images: Any) -> Any:
        pictures, size = Pictures(images), self.image_size

        def take(chosen: slice) -> np.ndarray:
            return pictures.batch(chosen, size, self.fit, self.module.encoder.mean)

        shape = pictures.shape(size, self.fit)
        return self._programs.run(method, len(pictures), shape, pictures.dtype, take, self.output)

    def _rows(self, method: str, rows: Shaped[np.ndarray, "B ..."]) -> Any:
        return self._programs.run(method, len(rows), rows.shape[1:], rows.dtype, rows.__getitem__, self.output)

    def _is_prefix(self, given: tuple[int, ...], whole: tuple[int, ...]) -> bool:
        """Codes of several levels decode from their first levels alone, coarse to fine."""
        same = len(given) == len(whole) and given[:-1] == whole[:-1]
        return same and 0 < given[-1] < whole[-1] and self.module.quantizer.decodes_prefixes

    def _check_indices(self, indices: Any) -> Int[np.ndarray, "B ..."]:
        indices, shape = as_numpy(indices), self.code_shape
        if not np.issubdtype(indices.dtype, np.integer):
            raise DataError(f"indices are {indices.dtype}; codes are integers in [0, {self.codebook_size})")
        if indices.shape[1:] != shape and not self._is_prefix(indices.shape[1:], shape):
            raise DataError(f"indices have shape {indices.shape}; expected [B, {', '.join(map(str, shape))}]")
        if indices.size and not 0 <= indices.min() <= indices.max() < self.codebook_size:
            raise DataError(
                f"indices span [{indices.min()}, {indices.max()}]; the codes are 0 to {self.codebook_size - 1}"
            )
        return indices.astype(np.int32)


def _check_options(
    mesh: Any = None,
    batch_size: Any = None,
    memory_limit: Any = None,
    fit: Any = "crop",
    output: Any = "numpy",
) -> None:
    """A word that is none of its kind would else do what another one does, and a number fail at the first picture."""
    words = {"fit": (fit, Fit), "output": (output, Output)}
    for name, (word, kind) in words.items():
        if word not in get_args(kind):
            raise DataError(f"{name}={word!r}: give one of {', '.join(map(repr, get_args(kind)))}")
    if mesh is not None and not isinstance(mesh, jax.sharding.Mesh):
        raise DataError(f"mesh={mesh!r}: give a jax.sharding.Mesh, as vqrae_jax.sharding.make_mesh() makes it")
    multiple = sharding.data_ways(mesh) if mesh else 1
    if batch_size is not None and not (
        isinstance(batch_size, numbers.Integral) and batch_size > 0 and batch_size % multiple == 0
    ):
        raise DataError(f"batch_size={batch_size!r}: give a positive multiple of {multiple}, the parts of every batch")
    if memory_limit is not None and not (isinstance(memory_limit, numbers.Real) and memory_limit > 0):
        raise DataError(f"memory_limit={memory_limit!r}: give a number of bytes, as 8 * 1024**3")
