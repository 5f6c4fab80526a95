"""A session in which a generator samples images and samples a region of an image again."""

import dataclasses
import os
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from vqrae_jax.data import images
from vqrae_jax.errors import ConfigError, DataError, UserError
from vqrae_jax.evaluation import visualize
from vqrae_jax.inference import editing
from vqrae_jax.inference.edit_session import VIEW, describe
from vqrae_jax.inference.generator import Generator
from vqrae_jax.inference.samples import class_labels

LIMIT = 64  # samples of one call
ANY, ALL = "any class", "all classes in turn"  # choices in place of a class
REGION = "Click two opposite corners of a region in the image."
BELOW = "The generator sees only the codes above and to the left, so that regions at the bottom fit best."
FIELDS = {"labels": "class", "method": "sampler"}  # controls of the page by the names of arguments


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """The samples that one visitor sees; each action of `GeneratorActions` returns new ones."""

    images: UInt8[np.ndarray, "B S S 3"] | None = None
    captions: tuple[str, ...] = ()
    history: Int[np.ndarray, "steps B ..."] | None = None  # codes after each step; one step of autoregression
    selected: int = 0
    message: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Repaint:
    """An image of which a region is sampled again."""

    codes: Int[np.ndarray, "..."] | None = None  # of the tokenizer's code_shape
    before: UInt8[np.ndarray, "S S 3"] | None = None  # these codes, decoded
    after: UInt8[np.ndarray, "S S 3"] | None = None
    corner: tuple[int, int] | None = None  # first corner of a region
    region: editing.Region | None = None
    message: str = ""


class GeneratorActions:
    """The actions on samples and images, with one generator; errors of a user become their message.

    Raises DataError if the generator has no tokenizer.
    """

    def __init__(self, generator: Generator):
        generator.require_tokenizer()
        self.generator, self.tokenizer, self.grid = generator, generator.tokenizer, generator.tokenizer.grid
        self.has_steps = generator.config.family == "masked"

    def sample(self, old: Samples, count: int, label: Any, seed: int, **settings: Any) -> Samples:
        """Samples images; `label` may be ANY or ALL, and the other arguments are those of `Generator.generate`."""
        generator = self.generator
        try:
            if not 1 <= count <= LIMIT:
                raise ConfigError(f"expected 1 to {LIMIT}", field="images", value=count)
            labels = [None if label == ANY else label] * count
            if label == ALL:
                labels = class_labels(generator.config.classes, count).tolist()
            numbers = generator.find_labels(labels).tolist()
            sample = generator.history if self.has_steps else generator.sample_codes
            codes = sample(labels, seed, **settings)
        except UserError as error:
            return dataclasses.replace(old, message=describe(error.renamed(FIELDS)))
        history = codes if self.has_steps else codes[None]
        decoded = visualize.to_uint8(self.tokenizer.decode_from_indices(history[-1]))
        captions = tuple(generator.class_name(i) for i in numbers) if generator.config.classes else ()
        text = (
            "Click a sample to see its steps, or to repaint it." if self.has_steps else "Click a sample to repaint it."
        )
        return Samples(decoded, captions, history, message=text)

    def choose(self, old: Samples, index: int) -> Samples:
        """Selects a sample."""
        return old if old.images is None else dataclasses.replace(old, selected=index)

    def show_steps(self, samples: Samples) -> UInt8[np.ndarray, "Y X 3"] | None:
        """Returns the steps of the selected sample, which those of autoregression do not have."""
        if samples.history is None or not self.has_steps:
            return None
        history, decode = samples.history[:, samples.selected], self.tokenizer.decode_from_indices
        return visualize.sampling_steps(history, self.generator.config.num_embeddings, decode, self.grid)

    def load_sample(self, old: Repaint, samples: Samples) -> Repaint:
        """Loads the selected sample."""
        if samples.history is None:
            return dataclasses.replace(old, message="**There are no samples yet.**")
        return self.load_codes(samples.history[-1, samples.selected])

    def load_file(self, old: Repaint, file: str | os.PathLike) -> Repaint:
        """Loads an image file; a file that is not an image changes only the message."""
        try:
            return self.load(images.read_image(file))
        except DataError as error:
            return dataclasses.replace(old, message=describe(error, file))

    def load(self, image: UInt8[np.ndarray, "H W 3"]) -> Repaint:
        """Encodes an image."""
        fitted = self.tokenizer.fit_images([image], decoded=True)[:1]
        return self.load_codes(np.asarray(self.tokenizer.encode_to_indices(fitted))[0])

    def load_codes(self, codes: Int[np.ndarray, "..."]) -> Repaint:
        """Loads the codes of an image."""
        text = REGION if self.has_steps else f"{REGION} {BELOW}"
        return Repaint(codes, self._decode(codes), message=text)

    def select(self, old: Repaint, x: float, y: float) -> Repaint:
        """Selects a corner of the region, then the opposite one; x and y are fractions of width and height."""
        if old.codes is None:
            return old
        position = editing.grid_position(self.grid, x, y)
        if old.corner is None:
            return Repaint(old.codes, old.before, corner=position, message="Now click the opposite corner.")
        top, left, bottom, right = region = editing.span(old.corner, position)
        text = f"{bottom - top} x {right - left} codes will be sampled again."
        return Repaint(old.codes, old.before, region=region, message=text)

    def repaint(self, old: Repaint, label: Any, seed: int, **settings: Any) -> Repaint:
        """Samples the region again; `label` may be ANY, and the arguments are those of `Generator.inpaint`."""
        if old.codes is None or old.region is None:
            return dataclasses.replace(old, message=f"**{REGION}**")
        try:
            mask = editing.region_mask(self.grid, old.region).reshape(-1, 1)  # of positions, for all of their levels
            mask = np.broadcast_to(mask, (mask.size, old.codes.size // mask.size)).reshape(old.codes.shape)
            codes = self.generator.inpaint(old.codes[None], mask, None if label == ANY else label, seed, **settings)[0]
        except UserError as error:
            return dataclasses.replace(old, message=describe(error.renamed(FIELDS)))
        changed = int((codes != old.codes).sum())
        text = f"{changed} codes changed; those outside of the region are the same."
        return dataclasses.replace(old, after=self._decode(codes), message=text)

    def render(self, state: Repaint) -> dict[str, UInt8[np.ndarray, "Y X 3"]]:
        """Returns the views of an image by name: before, hidden and after; those that do not exist are missing."""
        if state.before is None:
            return {}
        before = visualize.enlarge(state.before, VIEW)
        boxes = [editing.cell(*state.corner)] if state.corner else [state.region] if state.region else []
        views = {"before": visualize.mark_cells(before, self.grid, boxes)}
        if state.region:
            mask = editing.region_mask(self.grid, state.region)
            views["hidden"] = visualize.cover_cells(before[None], mask[None])[0]
        if state.after is not None:
            views["after"] = visualize.enlarge(state.after, VIEW)
        return views

    def _decode(self, codes: Int[np.ndarray, "..."]) -> UInt8[np.ndarray, "S S 3"]:
        return visualize.to_uint8(self.tokenizer.decode_from_indices(codes[None]))[0]
