"""A trained generator: images of classes from its tokenizer's codes, repainting, and likelihoods."""

import dataclasses
import functools
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from vqrae_jax import config as config_lib
from vqrae_jax import sharding, storage
from vqrae_jax.build import generator as builder
from vqrae_jax.errors import ConfigError, DataError, UserError, WeightsError
from vqrae_jax.generation.network import check_sampler, generate_codes, log_likelihood, schedule_codes
from vqrae_jax.generation.sampler_config import SamplerConfig
from vqrae_jax.inference import generator_card, saving
from vqrae_jax.inference.batching import place_variables
from vqrae_jax.inference.generator_location import locate_generator, read_generator_variables
from vqrae_jax.inference.inputs import as_numpy
from vqrae_jax.inference.tokenizer import Tokenizer, check_options
from vqrae_jax.models import generator as models
from vqrae_jax.pretrained import sources, writers

log = logging.getLogger(__name__)

BATCH = 32  # images per device and program
STATIC = ("method", "remasking", "top_k", "top_p")  # settings that need a program of their own, as has any guidance


class Generator:
    """Samples codes of images, decodes and repaints them.

    Labels are numbers of classes, names of classes, or None for images of any class. Sample number i of a seed is the
    same image in any batch and on any mesh.

    Attributes:
      config: the generator section, complete.
      tokenizer: the tokenizer of the codes; None if the generator was trained without it, which only samples codes.
      classes: the names of the classes, if they are known.
      sampler: the settings of the sampler that are not arguments of a call.
    """

    def __init__(
        self,
        module: models.CodeTransformer,
        variables: dict[str, Any],
        config: config_lib.GeneratorConfig,
        tokenizer: Tokenizer | None = None,
        *,
        classes: Sequence[str] | None = None,
        provenance: dict[str, Any] | None = None,
        mesh: jax.sharding.Mesh | None = None,
        batch_size: int | None = None,
    ):
        """
        Args:
          module, variables: the model, {"params", "batch_stats"}.
          config: the generator section that `module` was built from.
          tokenizer: has the hash in the config.
          classes: names of the labels.
          provenance: version, step and metrics of the training run.
          mesh: mesh to compute on; None: one device.
          batch_size: images per call of the network; None: 32 per device.

        Raises:
          ConfigError: an option is invalid.
          WeightsError: the tokenizer has another hash.
        """
        if tokenizer is not None and config.tokenizer_hash not in (None, tokenizer.hash):
            raise WeightsError(
                f"has the hash {tokenizer.hash[:12]}, but the generator's codes are of {config.tokenizer_hash[:12]}; "
                "pass the tokenizer that made its codes",
                field="tokenizer",
            )
        self.module, self.config, self.tokenizer, self.classes = module, config, tokenizer, classes
        check_options(mesh, batch_size)
        self.variables, self.mesh = place_variables(variables, mesh)
        self.provenance, self.sampler = provenance or {}, SamplerConfig(**config.sampler.model_dump())
        self._parts = sharding.data_ways(mesh) if mesh else 1
        self.batch_size = BATCH * self._parts if batch_size is None else batch_size
        self._compiled: dict[Any, Any] = {}

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        step: int | None = None,
        *,
        tokenizer: str | os.PathLike | Tokenizer | None = None,
        mesh: jax.sharding.Mesh | None = None,
        batch_size: int | None = None,
    ) -> "Generator":
        """Loads a generator from a run's workdir, a checkpoint, a saved folder or a hub id.

        Args:
          path: local path, address (gs://...) or hub id ("owner/name").
          step: checkpoint of a workdir; None: the newest.
          tokenizer: the tokenizer or its path; None: the one in the generator's config.
          mesh, batch_size: see the constructor.

        Raises:
          ConfigError: an option is invalid; nothing has been read.
          CheckpointError: no complete checkpoint of a generator exists.
          WeightsError: the tokenizer cannot be read or is another one, or the folder is damaged.
        """
        check_options(mesh, batch_size)
        location = locate_generator(path, step)
        module = builder.build_generator(location.config, mesh)
        variables = read_generator_variables(location, builder.variable_shapes(module), mesh)
        tokenizer = _load_tokenizer(location.config, tokenizer, mesh)
        return cls(
            module, variables, location.config, tokenizer, classes=location.classes, provenance=location.provenance,
            mesh=mesh, batch_size=batch_size,
        )  # fmt: skip

    from_pretrained = load

    def __repr__(self) -> str:
        return (
            f"Generator(family={self.config.family!r}, code_shape={self.code_shape}, "
            f"codebook_size={self.config.num_embeddings}, classes={self.config.classes})"
        )

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of the codes of one image."""
        if self.tokenizer is not None:
            return self.tokenizer.code_shape
        grids, levels = self.config.grids, self.config.levels
        row = len(grids) > 1 or grids[0][0] == 1 < grids[0][1]  # several grids, or tokens that are free of the grid
        shape = (self.module.config.positions,) if row else grids[0]
        return (*shape, levels) if levels > 1 else tuple(shape)

    def generate(
        self, labels: Any = None, seed: int = 0, guidance: float | None = None, steps: int | None = None,
        sampler: str | None = None, *, count: int | None = None, first: int = 0, **settings: Any,
    ) -> Float[np.ndarray, "B S S 3"]:  # fmt: skip
        """Samples images.

        Args:
          labels: one for each image, or one for `count` images; None: images of any class.
          seed: of all samples.
          guidance, steps: see `SamplerConfig`; None: as in the generator's config.
          sampler: the method of `SamplerConfig`.
          count: number of images; None: one for each label.
          first: number of the first image, to continue an earlier call.
          settings: other fields of `SamplerConfig`.

        Returns:
          Images in [0, 1].

        Raises:
          ConfigError: a setting is out of range.
          DataError: an unknown class, or a generator without a tokenizer.
        """
        self.require_tokenizer()
        codes = self.sample_codes(labels, seed, guidance, steps, sampler, count=count, first=first, **settings)
        return self.tokenizer.decode_from_indices(codes)

    def sample_codes(
        self, labels: Any = None, seed: int = 0, guidance: float | None = None, steps: int | None = None,
        sampler: str | None = None, *, count: int | None = None, first: int = 0, **settings: Any,
    ) -> Int[np.ndarray, "B ..."]:  # fmt: skip
        """Samples codes [B, *code_shape]; see `generate`."""
        config = self.choose_sampler(**{"guidance": guidance, "steps": steps, "method": sampler} | settings)
        labels = self._labels(labels, count)
        return self._sample(self._hidden(len(labels)), labels, seed, first, config)

    def inpaint(
        self, codes: Any, mask: Any, labels: Any = None, seed: int = 0,
        guidance: float | None = None, steps: int | None = None, sampler: str | None = None, **settings: Any,
    ) -> Int[np.ndarray, "B ..."]:  # fmt: skip
        """Samples the codes again that a mask marks, and keeps the others, of which an image has any number.

        An autoregressive generator sees only the codes before the sampled ones: use it to continue images downwards.

        Args:
          codes: [B, *code_shape].
          mask: True where to sample, of the shape of the grid [h, w] or of the codes, for all images or for each.
          labels, seed, guidance, steps, sampler, settings: see `generate`.

        Returns:
          Codes [B, *code_shape]; `tokenizer.decode_from_indices` decodes them.
        """
        config = self.choose_sampler(**{"guidance": guidance, "steps": steps, "method": sampler} | settings)
        codes = self._check_codes(codes)
        mask = self._check_mask(mask, len(codes))
        labels = self._labels(labels, len(codes))
        return self._sample(np.where(mask, self.config.num_embeddings, codes), labels, seed, 0, config)

    def history(
        self, labels: Any = None, seed: int = 0, guidance: float | None = None, steps: int | None = None,
        sampler: str | None = None, *, count: int | None = None, first: int = 0, **settings: Any,
    ) -> Int[np.ndarray, "S B ..."]:  # fmt: skip
        """Samples codes and returns those after each step of masked diffusion; hidden ones are K; see `generate`."""
        self.require_masked()
        config = self.choose_sampler(**{"guidance": guidance, "steps": steps, "method": sampler} | settings)
        labels = self._labels(labels, count)
        return self._sample(self._hidden(len(labels)), labels, seed, first, config, history=True)

    def log_likelihood(self, codes: Any, labels: Any = None, seed: int = 0) -> Float[np.ndarray, " B"]:
        """Returns log p of each image's codes in nats; for masked diffusion a random estimate of a lower bound.

        Divide by -ln 2 and the number of codes for bits per code. `seed` chooses which codes are hidden.
        """
        codes = self._check_codes(codes)
        labels = self._labels(labels, len(codes))
        program = functools.partial(self._program("likelihood", None), None)
        rows = np.arange(len(codes), dtype=np.int32)
        return self._run(program, codes, labels, rows, seed)

    def choose_sampler(self, **settings: Any) -> SamplerConfig:
        """Returns the sampler with some settings changed, those that are not None; raises ConfigError."""
        names = {field.name for field in dataclasses.fields(SamplerConfig)}
        if unknown := settings.keys() - names:
            raise ConfigError(
                f"unknown setting of the sampler; expected one of {', '.join(sorted(names))}", field=min(unknown)
            )
        changed = {name: value for name, value in settings.items() if value is not None}
        # Validated by the config's schema, which also checks types.
        section = config_lib.from_dict(config_lib.Sampler, dataclasses.asdict(self.sampler) | changed)
        sampler = SamplerConfig(**section.model_dump())
        check_sampler(sampler, self.module.config)
        return sampler

    def save_pretrained(self, folder: str | os.PathLike, name: str | None = None) -> storage.Path:
        """Writes config.json, model.safetensors and a model card with samples, for `load` and the hub.

        The tokenizer is named, not contained; save it as well.

        Args:
          folder: local path or address (gs://...); created if it is missing.
          name: path or hub id that the card's example loads; None: the folder's name.
        """
        storage.check_path(folder, "folder")
        target = storage.resolve_path(folder)
        if self.config.tokenizer and not sources.is_hub_id(self.config.tokenizer):
            log.warning(
                "the saved folder refers to the tokenizer in %s: pass another place to load as tokenizer=",
                self.config.tokenizer,
            )
        with storage.stage_output(target) as local:
            variables = jax.device_get(self.variables)
            saving.save_generator(local, self.config, variables, self.classes, self.provenance)
            generator_card.write_card(self, local, name or target.name)
        return target

    def push_to_hub(self, repo_id: str, private: bool = False, token: str | None = None) -> str:
        """Saves the generator to a repository of the model hub, created if it is missing; returns its address.

        Raises:
          ConfigError: the tokenizer is not on the hub.
          WeightsError: there is no network, login or permission to write.
        """
        source = self.config.tokenizer
        if source is None or not sources.is_hub_id(source):
            message = "is a folder that users of the hub cannot read: push the tokenizer, and set its hub id in config"
            raise ConfigError(message, field="generator.tokenizer", value=source)
        return writers.push_to_hub(functools.partial(self.save_pretrained, name=repo_id), repo_id, private, token)

    def stream_codes(
        self, labels: Int[np.ndarray, " N"], seed: int, config: SamplerConfig, first: int = 0
    ) -> Iterator[Int[np.ndarray, "b ..."]]:
        """Yields the codes of samples `first` and following in batches of at most `batch_size`."""
        for start in range(0, len(labels), self.batch_size):
            part = labels[start : start + self.batch_size]
            yield self._sample(self._hidden(len(part)), part, seed, first + start, config)

    def find_labels(self, labels: Any) -> Int[np.ndarray, " B"]:
        """Converts numbers or names of classes to numbers; None to the number that stands for any class.

        Raises:
          DataError: an unknown class.
        """
        count = self.config.classes
        values = labels if isinstance(labels, list | tuple | np.ndarray | jax.Array) else [labels]
        numbers = [self._label(value) for value in values]
        if count == 0 and any(value is not None for value in values):
            raise DataError("the generator has no classes; leave labels out", field="labels")
        return np.asarray(numbers, np.int32)

    def class_name(self, label: int) -> str:
        """Returns the name of a class, its number if names are not known, or "any class"."""
        if label == self.config.classes:
            return "any class"
        return self.classes[label] if self.classes else f"class {label}"

    def _hidden(self, count: int) -> Int[np.ndarray, "B T"]:
        return np.full((count, self.module.config.length), self.config.num_embeddings, np.int32)

    def _label(self, value: Any) -> int:
        count = self.config.classes
        if value is None:
            return count
        classes = self.classes or ()
        if isinstance(value, str) and value in classes:  # also names that are numbers, as those of digits
            return classes.index(value)
        if isinstance(value, str) and not (value.isdecimal() and len(value) < 20):
            names = ", ".join(classes[:12]) + (", ..." if len(classes) > 12 else "")
            expected = f"expected one of {names}" if names else f"names are not known; expected 0 to {count - 1}"
            raise DataError(f"unknown class; {expected}", field="labels", value=value)
        number = int(value) if isinstance(value, str | int | np.integer) and not isinstance(value, bool) else -1
        if not 0 <= number < max(count, 1):
            raise DataError(f"expected a class from 0 to {count - 1}, a name, or None", field="labels", value=value)
        return number

    def _labels(self, labels: Any, count: int | None) -> Int[np.ndarray, " B"]:
        numbers = self.find_labels(labels)
        if count is not None:
            _check_integer("count", count, 2**31)
        if count is not None and len(numbers) == 1:
            return np.repeat(numbers, count)
        if count not in (None, len(numbers)):
            raise DataError(f"there are {len(numbers)} labels for {count} images", field="labels")
        return numbers

    def _sample(
        self, indices: Int[np.ndarray, "B T"], labels: Int[np.ndarray, " B"], seed: int, first: int, config: Any,
        history: bool = False,
    ) -> Int[np.ndarray, "..."]:  # fmt: skip
        _check_integer("first", first, 2**31 - len(indices))
        rows = np.arange(first, first + len(indices), dtype=np.int32)
        program = self._program("history" if history else "sample", config)
        program = functools.partial(program, jax.device_get(schedule_codes(config, self.module.config)))
        codes = self._run(program, indices, labels, rows, seed, axis=int(history))
        return codes.reshape(*codes.shape[:-1], *self.code_shape)

    def _run(self, program: Any, codes: Any, labels: Any, rows: Any, seed: int, axis: int = 0) -> np.ndarray:
        """Runs a program on padded batches of one size; `axis` of its results is that of the images."""
        _check_integer("seed", seed, 2**32)
        if not len(codes):
            one = [np.zeros((1, *x.shape[1:]), np.int32) for x in (codes, labels, rows)]
            result = jax.eval_shape(program, self.variables, *one, np.uint32(seed))
            return np.zeros(result.shape, result.dtype).take(range(0), axis)
        parts = -(-len(codes) // self._parts)
        size = min(self._parts << (parts - 1).bit_length(), self.batch_size)
        split = sharding.over_data(self.mesh) if self.mesh else None
        results = []
        for start in range(0, len(codes), size):
            inputs = [np.asarray(x[start : start + size], np.int32) for x in (codes, labels, rows)]
            padded = [np.concatenate([x, np.repeat(x[-1:], size - len(x), axis=0)]) for x in inputs]
            results.append(np.asarray(program(self.variables, *jax.device_put(padded, split), np.uint32(seed))))
        return np.concatenate(results, axis).take(range(len(codes)), axis)

    def _program(self, kind: str, config: SamplerConfig | None) -> Any:
        """Returns the compiled function of schedule, variables, codes, labels, rows and seed."""
        settings = config and (*(getattr(config, name) for name in STATIC), config.guidance > 0)

        def run(schedule: Any, variables: Any, codes: Any, labels: Any, rows: Any, seed: Any) -> jax.Array:
            key, variables = jax.random.key(seed), builder.module_variables(variables)
            if kind == "likelihood":
                return log_likelihood(self.module, variables, key, codes, labels)[0]
            history = kind == "history"
            return generate_codes(self.module, variables, key, codes, labels, config, rows, history, schedule)

        if (kind, settings) not in self._compiled:
            self._compiled[kind, settings] = jax.jit(run)
        return self._compiled[kind, settings]

    def require_tokenizer(self) -> None:
        """Raises DataError without a tokenizer, which images need."""
        if self.tokenizer is None:
            message = "the generator was trained without a tokenizer; pass tokenizer= to load, or use sample_codes"
            raise DataError(message, field="tokenizer", value=None)

    def require_masked(self) -> None:
        """Raises ConfigError for an autoregressive generator, which has no steps to look at."""
        if self.module.config.blocks.causal:
            raise ConfigError("has one code per step; use a masked generator", field="family", value=self.config.family)

    def _check_codes(self, codes: Any) -> Int[np.ndarray, "B T"]:
        codes, size = as_numpy(codes), self.config.num_embeddings
        if not np.issubdtype(codes.dtype, np.integer) or codes.shape[1:] != self.code_shape:
            shape = ", ".join(map(str, self.code_shape))
            raise DataError(f"are {codes.dtype} {list(codes.shape)}; expected integers [B, {shape}]", field="codes")
        if codes.size and not 0 <= codes.min() <= codes.max() < size:
            raise DataError(f"span [{codes.min()}, {codes.max()}]; expected 0 to {size - 1}", field="codes")
        return codes.astype(np.int32).reshape(len(codes), self.module.config.length)

    def _check_mask(self, mask: Any, count: int) -> Bool[np.ndarray, "B T"]:
        mask, shape = as_numpy(mask), self.code_shape
        accepted = {shape, shape[:2]} if len(shape) > 1 else {shape}
        one = mask.shape if mask.shape in accepted else mask.shape[1:]
        if mask.dtype != bool or one not in accepted or (one != mask.shape and len(mask) != count):
            listed = " or ".join(str(list(s)) for s in sorted(accepted))
            message = f"is {mask.dtype} {list(mask.shape)}; expected bool {listed}, for all {count} images or for each"
            raise DataError(message, field="mask")
        if one != shape:
            mask = np.broadcast_to(mask[..., None], (*mask.shape, *shape[2:]))
        return np.broadcast_to(mask, (count, *shape)).reshape(count, self.module.config.length)


def _check_integer(field: str, value: Any, end: int) -> None:
    """Raises ConfigError unless the value is an integer in [0, end)."""
    if not isinstance(value, int | np.integer) or not 0 <= value < end:
        raise ConfigError(f"expected an integer from 0 to {end - 1}", field=field, value=value)


def _load_tokenizer(config: config_lib.GeneratorConfig, tokenizer: Any, mesh: Any) -> Tokenizer | None:
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    path = tokenizer or config.tokenizer
    if path is None:
        return None
    try:
        loaded = Tokenizer.load(path, mesh=mesh)
        if config.tokenizer_hash not in (None, loaded.hash):  # of codes that were encoded in bfloat16
            loaded = Tokenizer.load(path, mesh=mesh, encoder_dtype="bfloat16")
    except UserError as error:
        raise error.renamed({"checkpoint": "tokenizer"}) from error.__cause__
    return loaded
