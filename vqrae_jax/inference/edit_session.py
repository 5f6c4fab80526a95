"""A session in which codes are looked at and edited: two images, a mix of their codes, and the actions on them."""

import dataclasses
import os
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from vqrae_jax.data import images
from vqrae_jax.errors import DataError, UserError
from vqrae_jax.evaluation import visualize
from vqrae_jax.inference import editing
from vqrae_jax.inference.tokenizer import Tokenizer

VIEW = 320  # pixels of the views, at least
NEAREST = 8  # patches shown next to the selected one
STEPS = 10  # of the blend from the first image to the second
FIRST, SECOND, MIX = range(3)  # positions in Session.slots


@dataclasses.dataclass(frozen=True, eq=False)
class Slot:
    """An image as codes."""

    image: UInt8[np.ndarray, "S S 3"] | None  # None for the mix
    codes: Int[np.ndarray, "h w *levels"]
    latents: Float[np.ndarray, "h w C"]
    reconstruction: UInt8[np.ndarray, "S S 3"]


@dataclasses.dataclass(frozen=True)
class Session:
    """The state of one visitor; each action of `Editor` returns a new one."""

    slots: tuple[Slot | None, Slot | None, Slot | None] = (None, None, None)
    blends: tuple[Any, ...] = ()  # codes of all steps from the first image to the second, once one is requested
    weight: float = 0.0  # of the second image in the mix
    selected: tuple[int, int, int] | None = None  # slot, row, column
    corner: tuple[int, int] | None = None  # first corner of a region
    region: editing.Region | None = None  # in the second image
    message: str = ""

    def change(self, message: str, **fields: Any) -> "Session":
        return dataclasses.replace(self, message=message, **fields)


class Editor:
    """The actions on sessions, with one tokenizer; DataError if its codes have no positions."""

    def __init__(self, tokenizer: Tokenizer):
        editing.as_grid(tokenizer, np.zeros(tokenizer.code_shape, np.int32))
        self.tokenizer = tokenizer

    def load_file(self, session: Session, slot: int, file: str | os.PathLike) -> Session:
        """Loads an image file into a slot; a file that is not an image changes only the message."""
        try:
            return self.load(session, slot, images.read_image(file))
        except DataError as error:
            return session.change(describe(error, file))

    def load(self, session: Session, slot: int, image: UInt8[np.ndarray, "H W 3"]) -> Session:
        """Encodes an image into a slot; the mix is the first image again."""
        tokenizer = self.tokenizer
        image = tokenizer.fit_images([image], decoded=True)[:1][0]
        codes = editing.as_grid(tokenizer, np.asarray(tokenizer.encode_to_indices(image[None])))[0]
        loaded = dataclasses.replace(self._decode(codes), image=image)
        error = np.mean((loaded.reconstruction.astype(np.float64) - image) ** 2)
        psnr = 10 * np.log10(255**2 / max(error, 1e-12))
        text = f"{codes.size} codes of {tokenizer.codebook_size}, {len(np.unique(codes))} different; PSNR {psnr:.1f} dB"
        first, second = (loaded if i == slot else session.slots[i] for i in (FIRST, SECOND))
        return Session((first, second, first or second), message=text)

    def blend(self, session: Session, weight: float) -> Session:
        """Makes the mix from the codes nearest to the weighted means of both images' latents."""
        first, second, _ = session.slots
        if first is None or second is None:
            return session.change("A blend needs two images.")
        blends = session.blends
        if not blends:
            pair = (slot.codes.reshape(self.tokenizer.code_shape) for slot in (first, second))
            blends = tuple(editing.blend(self.tokenizer, *pair, np.linspace(0, 1, STEPS + 1).tolist()))
        codes = blends[round(weight * STEPS)].reshape(first.codes.shape)
        shares = ((codes == slot.codes).reshape(*codes.shape[:2], -1).all(-1).mean() for slot in (first, second))
        text = "Codes nearest to the weighted means: {:.0%} are those of the first image, {:.0%} those of the second."
        text = text.format(*shares)
        return session.change(text, slots=(first, second, self._decode(codes)), blends=blends, weight=weight)

    def select(self, session: Session, slot: int, x: float, y: float) -> Session:
        """Selects a patch; x and y are fractions of width and height."""
        if session.slots[slot] is None:
            return session
        row, column = editing.grid_position(self.tokenizer.grid, x, y)
        code = session.slots[slot].codes[row, column]
        same = sum((s.codes == code).reshape(*s.codes.shape[:2], -1).all(-1).sum() for s in session.slots[:MIX] if s)
        name = ", ".join(map(str, np.atleast_1d(code)))
        count = "once" if same == 1 else f"{same} times"
        text = f"Row {row}, column {column}: code **{name}**, {count} in these images. Below: the nearest patches."
        return session.change(text, selected=(slot, row, column))

    def paste(self, session: Session, slot: int, x: float, y: float) -> Session:
        """Selects a corner of a region in the second image, or pastes the region to a position in the mix."""
        (_, second, mix), position = session.slots, editing.grid_position(self.tokenizer.grid, x, y)
        if slot == SECOND and second:
            return _select_corner(session, position)
        if session.region is None or slot != MIX:
            return session.change("Click two corners of a region in the second image, then a position in the mix.")
        codes = editing.paste(mix.codes, second.codes, session.region, position)
        changed = (codes != mix.codes).any(axis=tuple(range(2, codes.ndim))).sum()
        text = f"Pasted at row {position[0]}, column {position[1]}: {changed} codes changed."
        return session.change(text, slots=(*session.slots[:MIX], self._decode(codes)), selected=None)

    def restore(self, session: Session) -> Session:
        """Makes the mix the first image again."""
        first, second, _ = session.slots
        slots = first, second, first or second
        return session.change("The mix is the first image.", slots=slots, weight=0.0, selected=None)

    def render(self, session: Session) -> dict[str, UInt8[np.ndarray, "..."] | None]:
        """Returns the views of a session by name; those of empty slots are missing."""
        slots = {i: slot for i, slot in enumerate(session.slots) if slot}
        if not slots:
            return {}
        views = {f"input{i}": visualize.enlarge(slots[i].image, VIEW) for i in slots if i != MIX}
        decoded = visualize.enlarge(np.stack([slot.reconstruction for slot in slots.values()]), VIEW)
        maps = visualize.code_maps(np.stack([slot.codes for slot in slots.values()]), decoded)
        for i, pair in zip(slots, zip(decoded, maps, strict=True), strict=True):
            boxes = [editing.cell(*session.selected[1:])] if session.selected and session.selected[0] == i else []
            boxes += [editing.cell(*session.corner)] if session.corner and i == SECOND else []
            boxes += [session.region] if session.region and i == SECOND else []
            marked = (visualize.mark_cells(view, self.tokenizer.grid, boxes) for view in pair)
            views |= dict(zip((f"reconstruction{i}", f"codes{i}"), marked, strict=True))
        if session.selected:
            views["nearest"] = self._nearest_patches(session, *session.selected)
        return views

    def _decode(self, codes: Int[np.ndarray, "h w *levels"]) -> Slot:
        indices = codes.reshape(1, *self.tokenizer.code_shape)
        reconstruction = visualize.to_uint8(self.tokenizer.decode_from_indices(indices))[0]
        latents = np.asarray(self.tokenizer.lookup(indices)).reshape(*codes.shape[:2], -1)
        return Slot(None, codes, latents, reconstruction)

    def _nearest_patches(self, session: Session, slot: int, row: int, column: int) -> UInt8[np.ndarray, "Y X 3"]:
        """Returns a patch and those of the images whose latents are nearest to it."""
        first, second, mix = session.slots
        searched = list(dict.fromkeys(s for s in (mix if slot == MIX else first, second) if s))
        start = (searched.index(session.slots[slot]), row, column)
        nearest = editing.nearest_patches(np.stack([s.latents for s in searched]), start, NEAREST)
        side = self.tokenizer.downsampling
        cells = [(searched[i].reconstruction, y * side, x * side) for i, y, x in (start, *nearest)]
        return visualize.strip([image[y : y + side, x : x + side] for image, y, x in cells], 64)


def describe(error: UserError, file: str | os.PathLike | None = None) -> str:
    """Returns an error as one sentence of a page, without the folder of the file that it is about."""
    text = str(error).rstrip(".")
    if file is not None:
        text = text.replace(repr(os.fspath(file)), pathlib.Path(file).name)
    return f"**{text[:1].upper()}{text[1:]}.**"


def _select_corner(session: Session, position: tuple[int, int]) -> Session:
    """Sets the first corner of a region, then the opposite one, then starts again."""
    if session.corner is None:
        return session.change("Now click the opposite corner.", corner=position, region=None)
    top, left, bottom, right = region = editing.span(session.corner, position)
    text = f"{bottom - top} x {right - left} codes selected: click their position in the mix."
    return session.change(text, corner=None, region=region)
