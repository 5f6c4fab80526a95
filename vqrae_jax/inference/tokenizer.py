"""A tokenizer: images to codes and back."""

import functools
import hashlib
import json
import math
import numbers
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import jax
import numpy as np
from jaxtyping import Float, Int, Shaped

from vqrae_jax import config as config_lib
from vqrae_jax import sharding, storage
from vqrae_jax.build.tokenizer import build_tokenizer, initial_variables, start_quantizer
from vqrae_jax.errors import ConfigError, DataError
from vqrae_jax.inference import batching, card, saving
from vqrae_jax.inference.inputs import MAX_RATIO, Fit, FittedImages, as_numpy, check_latents
from vqrae_jax.inference.location import locate, read_model, suggest_encoder
from vqrae_jax.models.vqrae import VQRAE
from vqrae_jax.pretrained import writers
from vqrae_jax.quantizers.registry import all_settings

Output = Literal["numpy", "jax"]
EncoderDtype = Literal["float32", "bfloat16"]
Result = np.ndarray | jax.Array  # numpy by default, jax with output="jax"

METHODS = ("encode", "encode_to_indices", "lookup", "decode", "decode_from_indices")
# Fields of the model section that affect the meaning of a code, in addition to the weights.
HASHED_FIELDS = (
    "encoder_cls", "encoder_input_size", "quantizer", "quantize_before_reshape",
    "encoder_params.normalize", "encoder_params.layers", "encoder_params.fusion",
    *(path for path, setting in all_settings().items() if setting.hashed),
)  # fmt: skip


class Tokenizer:
    """Encodes images to indices and decodes indices to images.

    Images are an array [B, H, W, 3], a PIL image, or a list of PIL images and arrays [H, W, 3]. Arrays are of numpy,
    JAX or PyTorch, uint8 or floats in [0, 1], of any size; `fit` makes them squares of `image_size` pixels, or keeps
    their proportions. Results are numpy arrays, or JAX arrays with output="jax". Decoded images are float32 in [0, 1],
    [B, S, S, 3], S = image_size; with fit="keep" [B, H, W, 3], `downsampling` pixels per position of the grid.
    Any number of images is processed in padded batches of few sizes, so few programs are compiled. The codes of an
    image depend on neither its batch nor the mesh, in any dtype.

    Attributes:
      module, variables: the model as it runs, with the encoder's position grid resampled to its input size.
      trained: the variables as they were trained and are saved.
      encoder_dtype: dtype of the encoder's activations, which is not necessarily that of training.
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
        encoder_dtype: EncoderDtype = "float32",
    ):
        """
        Args:
          module: the model.
          variables: {"params": ..., "batch_stats": ...} of the whole model, numpy or JAX arrays. With
            jax.ShapeDtypeStruct leaves only the properties work.
          config: the model section that `module` was built from; needed to save, and for `hash`.
          frozen: whether the encoder is the pretrained one that `config` names.
          provenance: version, step, data and metrics of the training run, for the model card.
          mesh: mesh to compute on; None: the devices of the variables. Batches are split over all axes but "model".
          batch_size: images per batch that is decoded; None: powers of two up to 64 that fit into `memory_limit`.
          memory_limit: bytes per device for the intermediate values of a program that decodes; None: half of the
            device's memory.
          fit: "crop" takes the central square of an image, "pad" shows the whole image on the encoder's mean color,
            "stretch" changes its proportions; all resample bicubically with antialiasing. "model" resizes images as
            the PyTorch VQRAE does: to the encoder's input size, bicubically without antialiasing, which changes the
            proportions and gives other codes. "keep" makes the short side `image_size` and the long side the nearest
            multiple of `downsampling`, up to 4:1; all images of a call must get one shape, and their grid [h, w] has
            the same proportions. Squares have the codes of "stretch".
          output: "numpy", or "jax" to leave results on the device.
          encoder_dtype: "bfloat16" is several times as fast on TPUs and GPUs, but a few percent of its codes differ
            from those of float32, and between kinds of devices. It is part of `hash`.
        """
        check_options(mesh, batch_size, memory_limit, fit, output, encoder_dtype)
        self.config, self.frozen, self.provenance = config, frozen, provenance or {}
        self.trained, self.mesh = batching.place_variables(variables, mesh)
        module = batching.set_encoder_dtype(module, encoder_dtype)
        self.encoder_dtype, self.fit, self.output = encoder_dtype, fit, output
        self.batch_size, self.memory_limit = batch_size, memory_limit
        self.module, self.variables = batching.resample_encoder(module, self.trained)
        if fit == "keep":  # the position grid is resampled for every shape
            self.module, self.variables = batching.keep_shapes(module), self.trained
            self._check_grid()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        step: int | None = None,
        *,
        encoder: str | os.PathLike | None = None,
        mesh: jax.sharding.Mesh | None = None,
        batch_size: int | None = None,
        memory_limit: int | None = None,
        fit: Fit = "crop",
        output: Output = "numpy",
        encoder_dtype: EncoderDtype = "float32",
    ) -> "Tokenizer":
        """Loads a tokenizer from a run's workdir, a checkpoint, a saved folder or a hub id.

        Neither checkpoints nor folders contain a frozen encoder, unless it was embedded: it is read from the path or
        hub id in the config, or from `encoder`.

        Args:
          path: local path, address (gs://...) or hub id ("owner/name").
          step: checkpoint of a workdir; None: the newest.
          encoder: folder or hub id of the frozen encoder's weights, in place of the one in the config. A saved folder
            has their hash and refuses others.
          mesh, batch_size, memory_limit, fit, output, encoder_dtype: see the constructor.

        Raises:
          ConfigError: an option is invalid; nothing has been read.
          CheckpointError: no complete checkpoint exists, or it does not fit its config.
          WeightsError: the encoder's weights are not available, the folder is damaged, or the hub cannot be reached.
        """
        check_options(mesh, batch_size, memory_limit, fit, output, encoder_dtype)
        location = locate(path, step, encoder)
        with suggest_encoder(location):
            module, variables = read_model(location, mesh)
        return cls(
            module, variables, location.config, frozen=location.frozen, provenance=location.provenance, mesh=mesh,
            batch_size=batch_size, memory_limit=memory_limit, fit=fit, output=output, encoder_dtype=encoder_dtype,
        )  # fmt: skip

    from_pretrained = load

    @classmethod
    def from_config(
        cls,
        config: config_lib.ModelConfig | Mapping[str, Any],
        images: Any = None,
        seed: int = 0,
        *,
        mesh: jax.sharding.Mesh | None = None,
        batch_size: int | None = None,
        memory_limit: int | None = None,
        fit: Fit = "crop",
        output: Output = "numpy",
        encoder_dtype: EncoderDtype = "float32",
    ) -> "Tokenizer":
        """Builds a tokenizer before training: a pretrained encoder, if the config names one, and random other parts.

        Args:
          config: the model section, or its fields by name.
          images: a batch whose latents the codebook starts from, as in the first step of training; with fit="keep"
            of their central squares. None: it is random.
          seed: of the random parameters.
          mesh, batch_size, memory_limit, fit, output, encoder_dtype: see the constructor.

        Raises:
          ConfigError: a field or an option is invalid.
          WeightsError: the pretrained weights are not available.
        """
        check_options(mesh, batch_size, memory_limit, fit, output, encoder_dtype)
        if not isinstance(config, config_lib.ModelConfig):
            config = config_lib.from_dict(config_lib.ModelConfig, dict(config))
        built, key = build_tokenizer(config, mesh=mesh), jax.random.key(seed)
        placement = functools.partial(batching.leaf_shardings, mesh=mesh)
        variables = initial_variables(built, key, ("encoder", "quantizer", "decoder"), placement)
        if images is not None:
            encoder = built.module.encoder
            size = encoder.input_size if fit == "model" else built.image_size
            fitted = FittedImages(images, size, "crop" if fit == "keep" else fit, encoder.mean)
            if not len(fitted):
                raise DataError("no images; expected at least one", field="images")
            variables, _ = start_quantizer(built.module, variables, batching.to_float(fitted[:]), key)
        return cls(
            built.module, variables, config, frozen=config.encoder_config_path is not None, mesh=mesh,
            batch_size=batch_size, memory_limit=memory_limit, fit=fit, output=output, encoder_dtype=encoder_dtype,
        )  # fmt: skip

    def __repr__(self) -> str:
        codes = f"code_shape={self.code_shape}, codebook_size={self.codebook_size}" if self.has_codes else "no codes"
        return f"Tokenizer(image_size={self.image_size}, {codes}, encoder_dtype={self.encoder_dtype})"

    @property
    def has_codes(self) -> bool:
        """False for a continuous autoencoder (quantizer "none"), which only encodes and decodes."""
        return self.module.quantizer.has_indices

    @property
    def codebook_size(self) -> int:
        """Number of codes K; with several levels or groups, of each."""
        self._check_has_codes()
        return self.module.quantizer.num_embeddings

    @property
    def grid(self) -> int:
        """Side of the grid of codes: a square image has grid * grid positions; 0 with model.resampler_tokens."""
        return self.module.code_grid

    @functools.cached_property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of the indices of one square image."""
        self._check_has_codes()
        return self._row_shape("encode_to_indices")

    @property
    def code_dtype(self) -> np.dtype:
        """The smaller of uint16 and int32 that can store all indices."""
        return np.dtype(np.uint16 if self.codebook_size <= 1 << 16 else np.int32)

    @property
    def bits_per_image(self) -> float:
        """Number of indices per image times log2 of the codebook size."""
        return math.prod(self.code_shape) * math.log2(self.codebook_size)

    @property
    def image_size(self) -> int:
        """Side in pixels of decoded images, the short one of those that are not squares."""
        return self.module.decoder.image_size

    @property
    def downsampling(self) -> int:
        """Pixels per position of the decoder's grid, along one side."""
        return self.module.decoder.patch

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of encoder, quantizer and their settings, which determine the meaning of a code, not the decoder.

        The dtype of the encoder is among them, unless the model was trained and encodes in float32.
        """
        if self.config is None:
            raise DataError("a tokenizer without a config has no hash: pass config=, or load it from its folder")
        values = self.config.model_dump(mode="json")
        settings = {name: functools.reduce(dict.__getitem__, name.split("."), values) for name in HASHED_FIELDS}
        if (self.config.dtype, self.encoder_dtype) != ("float32", "float32"):
            settings["encoder_dtype"] = self.encoder_dtype
        parts = ("encoder", "quantizer", "latent")
        trees = {f"{kind}/{part}": tree[part] for kind, tree in self.trained.items() for part in parts if part in tree}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        digest.update(writers.content_hash(jax.device_get(trees)).encode())
        return digest.hexdigest()

    def encode(self, images: Any) -> Float[Result, "B ..."]:
        """Returns quantized latents [B, h, w, C], as `decode` takes them ([B, h*w, C] with reshape_to_2d=False)."""
        if self.has_codes:
            return self.lookup(self.encode_to_indices(images))
        return self._run("encode", self.fit_images(images))

    def encode_to_indices(self, images: Any) -> Int[Result, "B ..."]:
        """Returns int32 indices in [0, codebook_size), [B, *code_shape] of squares.

        The shape is [B, h, w], or [B, h*w] with quantize_before_reshape; several levels are the last axis.
        """
        self._check_has_codes()
        return self._run("encode_to_indices", self.fit_images(images))

    def decode(self, latents: Any) -> Float[Result, "B H W 3"]:
        """Decodes latents of `encode` or `lookup`, finite numbers, to images."""
        latents = as_numpy(latents)
        return self._run("decode", check_latents(latents, self._expected_shape(latents, self._row_shape("encode"))))

    def decode_from_indices(self, indices: Any) -> Float[Result, "B H W 3"]:
        """Decodes indices of `encode_to_indices` to images; also of the first levels or scales alone."""
        return self._run("decode_from_indices", self._check_indices(indices))

    def lookup(self, indices: Any) -> Float[Result, "B ..."]:
        """Returns the latents of indices: lookup(encode_to_indices(images)) equals encode(images)."""
        return self._run("lookup", self._check_indices(indices))

    def reconstruct(self, images: Any) -> Float[Result, "B H W 3"]:
        """Returns decode_from_indices(encode_to_indices(images)); without codes, decode(encode(images))."""
        if not self.has_codes:
            return self.decode(self.encode(images))
        return self.decode_from_indices(self.encode_to_indices(images))

    def fit_images(self, images: Any, decoded: bool = False) -> FittedImages:
        """Checks images and fits them to the size that is encoded, slice by slice.

        The size is `image_size`, and with fit="model" the encoder's input size; with `decoded` it is always
        `image_size`, to compare images with decoded ones.
        """
        encoder, size, fit = self.module.encoder, self.image_size, self.fit
        if fit == "model":
            size, fit = (size, "stretch") if decoded else (encoder.input_size, fit)
        return FittedImages(images, size, fit, encoder.mean, self.downsampling)

    def function(self, method: str) -> Callable[[Any, Any], Any]:
        """Returns a pure function (variables, x) -> result to use in jitted code, differentiable where the model is.

        `method` is encode, encode_to_indices, lookup, decode or decode_from_indices. Pass `tokenizer.variables`. Images
        are [B, H, W, 3] floats in [0, 1]; decoded images are not clipped. Nothing is resized, padded or checked.
        """
        if method not in METHODS:
            raise ConfigError(f"expected one of {', '.join(METHODS)}", field="method", value=method)
        return lambda variables, x: self.module.apply(variables, x, method=method)

    def stream(self, method: str, batches: Iterable[Shaped[np.ndarray, "_ ..."]]) -> Iterator[np.ndarray]:
        """Yields the results of batches in order; one is computed while the previous result is copied and used.

        Nothing is checked or resized: images have the size that `fit_images` gives them, uint8 or float32. Methods
        that do not encode are compiled once for each shape of batch.
        """
        return self._programs.stream(method, batches)

    def save_pretrained(
        self, folder: str | os.PathLike, images: Any = None, name: str | None = None, embed_encoder: bool = False
    ) -> storage.Path:
        """Writes config.json, model.safetensors and a model card to `folder`, for `load` and the hub.

        Args:
          folder: local path or address (gs://...); created if it is missing.
          images: images for the card, which shows their reconstructions and metrics.
          name: path or hub id that the card's example loads; None: the folder's name.
          embed_encoder: whether the folder also contains the weights of a frozen pretrained encoder, so that loading
            reads nothing else; otherwise it has their source and content hash.

        Raises:
          ConfigError: the folder is not a path.
          DataError: the tokenizer was built without a config, or the images are invalid.
        """
        if self.config is None:
            raise DataError("a tokenizer without a config cannot be saved: pass config=, or load it from its folder")
        storage.check_path(folder, "folder")
        target, fitted = storage.resolve_path(folder), None if images is None else self.fit_images(images, decoded=True)
        with storage.stage_output(target) as local:
            frozen = self.frozen and not embed_encoder
            saving.save_folder(local, self.config, jax.device_get(self.trained), frozen, self.provenance)
            card.write_card(self, local, name or target.name, fitted, embedded=not frozen)
        return target

    def push_to_hub(
        self,
        repo_id: str,
        images: Any = None,
        private: bool = False,
        token: str | None = None,
        embed_encoder: bool = False,
    ) -> str:
        """Saves the tokenizer to a repository of the model hub, created if it is missing; returns its address.

        Raises:
          ConfigError: the encoder is in a local folder or a bucket, and would not be in the repository.
          WeightsError: there is no network, login or permission to write.
        """
        if self.config and self.frozen and not embed_encoder and (source := saving.local_encoder(self.config)):
            raise ConfigError(
                "is a folder that users of the hub cannot read: pass embed_encoder=True to upload the encoder as well, "
                "or load the tokenizer with encoder='OWNER/NAME' if the hub has the same weights",
                field="model.encoder_config_path", value=source,
            )  # fmt: skip
        save = functools.partial(self.save_pretrained, images=images, name=repo_id, embed_encoder=embed_encoder)
        return writers.push_to_hub(save, repo_id, private, token)

    @property
    def encoding(self) -> str:
        """Arithmetic that decides codes: the dtype, and in bfloat16 also the shape of the programs and the device."""
        if self.encoder_dtype == "float32":
            return "float32"
        device = jax.tree.leaves(self.variables)[0].devices().pop().device_kind
        return f"bfloat16, {self._programs.encoded} images per program and device, {device}"

    @functools.cached_property
    def _programs(self) -> batching.Programs:
        return batching.Programs(self.module, self.variables, self.mesh, self.batch_size, self.memory_limit)

    def _run(self, method: str, rows: batching.Rows) -> Shaped[Result, "B ..."]:
        return self._programs.run(method, rows, self.output)

    def _row_shape(self, method: str) -> tuple[int, ...]:
        """Returns the shape of the result for one square image."""
        image = jax.ShapeDtypeStruct((1, self.image_size, self.image_size, 3), np.float32)
        return jax.eval_shape(self.function(method), self.variables, image).shape[1:]

    def _expected_shape(self, rows: np.ndarray, square: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape that `rows` must have, that of a square image, or with fit="keep" with their own grid."""
        if self.fit != "keep":
            return square
        sides, longest = rows.shape[1:3], MAX_RATIO * self.grid
        if len(sides) < 2 or min(sides) != self.grid or max(sides) > longest:
            expected = f"[B, h, w, ...] with a short side of {self.grid} and a long one of up to {longest}"
            raise DataError(f"indices or latents have shape {rows.shape}; expected {expected}")
        return (*sides, *square[2:])

    def _check_grid(self) -> None:
        """Raises ConfigError for a model without a free grid of latents and codes."""
        grid, reason = (self.grid, self.grid), None
        shapes = [self._row_shape("encode"), *([self.code_shape] if self.has_codes else [])]
        if fixed := [shape for shape in shapes if shape[:2] != grid]:
            reason = f"needs a grid [h, w] of latents and codes, but this model has {list(fixed[0])} of each image"
        elif any(len(shape) > 1 for _, shape in self.module.latent_stats):
            reason = "needs latent statistics per channel, but model.normalization_stat_path has them per position"
        if reason:
            raise ConfigError(f"{reason}; use 'crop', 'pad' or 'stretch'", field="fit", value="keep")

    def _check_has_codes(self) -> None:
        if not self.has_codes:
            raise DataError('a continuous autoencoder (quantizer "none") has no codes: use encode and decode')

    def _check_indices(self, indices: Any) -> Int[np.ndarray, "B ..."]:
        indices, size = as_numpy(indices), self.codebook_size
        expected = self._expected_shape(indices, self.code_shape)
        if not np.issubdtype(indices.dtype, np.integer):
            raise DataError(f"indices are {indices.dtype}; expected integers in [0, {size})")
        shapes = [expected, *((*expected[:-1], length) for length in self.module.quantizer.prefixes)]
        if indices.shape[1:] not in shapes:
            accepted = " or ".join(f"[B, {', '.join(map(str, shape))}]" for shape in sorted(set(shapes)))
            raise DataError(f"indices have shape {indices.shape}; expected {accepted}")
        if indices.size and not 0 <= indices.min() <= indices.max() < size:
            raise DataError(f"indices span [{indices.min()}, {indices.max()}]; expected 0 to {size - 1}")
        return indices.astype(np.int32)


def check_options(
    mesh: Any, batch_size: Any, memory_limit: Any = None, fit: Any = "crop", output: Any = "numpy",
    encoder_dtype: Any = "float32",
) -> None:  # fmt: skip
    """Raises ConfigError for an invalid option of `Tokenizer`; a generator has the first two."""
    is_mesh = isinstance(mesh, jax.sharding.Mesh)
    parts = sharding.data_ways(mesh) if is_mesh else 1
    valid_batch = isinstance(batch_size, numbers.Integral) and batch_size > 0 and batch_size % parts == 0
    valid_limit = isinstance(memory_limit, numbers.Real) and memory_limit > 0
    multiple = f"a positive multiple of {parts}, the number of devices that share a batch"
    for field, value, valid, expected in (
        ("fit", fit, fit in get_args(Fit), f"one of {', '.join(map(repr, get_args(Fit)))}"),
        ("output", output, output in get_args(Output), f"one of {', '.join(map(repr, get_args(Output)))}"),
        ("encoder_dtype", encoder_dtype, encoder_dtype in get_args(EncoderDtype), "'float32' or 'bfloat16'"),
        ("mesh", mesh, mesh is None or is_mesh, "a jax.sharding.Mesh, for example of vqrae_jax.sharding.make_mesh()"),
        ("batch_size", batch_size, batch_size is None or valid_batch, multiple),
        ("memory_limit", memory_limit, memory_limit is None or valid_limit, "a number of bytes, such as 8 * 1024**3"),
    ):
        if not valid:
            raise ConfigError(f"expected {expected}", field=field, value=value)
