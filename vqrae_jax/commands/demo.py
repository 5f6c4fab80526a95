"""python -m vqrae_jax.commands.demo --checkpoint=runs/quickstart

A web page, served to this machine alone: two pictures with their reconstructions and codes. A click on a patch shows
its code and the patches that are nearest to it; a region of the second picture's codes is painted into the first.
"""

import argparse
import dataclasses
import os
import pathlib
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from vqrae_jax.commands import command_line as command
from vqrae_jax.data import images
from vqrae_jax.errors import ConfigError, ImageError
from vqrae_jax.evaluation import visualize as pictures
from vqrae_jax.inference import editing, inputs
from vqrae_jax.inference.tokenizer import Tokenizer

VIEW = 320  # pixels of a picture on the page, at least
HEIGHT = VIEW + 64  # of its box, so that the label does not lie on it
NEAREST = 8
TITLE = "Pictures as codes"
HELP = """Drop a picture into each slot. With **look**, click a patch: its code and the patches nearest to it appear
below. With **paint**, click two corners in the second picture's codes, then a place in the first."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vqrae_jax.commands.demo",
        description="A web page to see, compare and edit the codes of pictures; needs the `demo` extra.",
    )
    parser.add_argument("--checkpoint", required=True, help=command.CHECKPOINT)
    parser.add_argument("--step", type=int, help="checkpoint step; the newest by default")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on; default: this machine alone")
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    parser.add_argument(
        "--max_upload", type=command.at_least_1, default=10, help="largest file taken, in MB; default: 10"
    )
    return parser.parse_args(argv)


@dataclasses.dataclass(frozen=True)
class Slot:
    """One picture on the page."""

    image: np.ndarray  # uint8 [S, S, 3]
    original: np.ndarray  # codes [h, w, *levels] of the image
    codes: np.ndarray  # as edited
    painted: np.ndarray  # uint8 [S, S, 3], from `codes`
    latents: np.ndarray  # [h, w, C] of `codes`


@dataclasses.dataclass(frozen=True)
class Session:
    """What one visitor sees. Every click makes a new one."""

    slots: tuple[Slot | None, Slot | None] = (None, None)
    looked: tuple[int, int, int] | None = None  # slot, row, column
    corner: tuple[int, int] | None = None  # first click of a region
    region: editing.Region | None = None  # in the second picture
    message: str = HELP


class Page:
    """What clicks and uploads do; knows nothing of the server."""

    def __init__(self, tokenizer: Tokenizer):
        editing.as_grid(tokenizer, np.zeros(tokenizer.code_shape, np.int32))  # codes without a place have no page
        self.tokenizer = tokenizer

    def load(self, session: Session, slot: int, file: str | None) -> Session:
        """Puts a picture file into a slot; None empties it. A file that is no picture changes only the message."""
        empty = dataclasses.replace(session, looked=None, corner=None, region=None)
        if file is None:
            return _with_slot(empty, slot, None, HELP)
        tokenizer = self.tokenizer
        try:
            picture = images.read_image(file)
        except ImageError as error:
            reason = str(error).replace(repr(file), repr(pathlib.Path(file).name))
            return dataclasses.replace(session, message=f"**{reason}**")
        image = inputs.fitted(picture, tokenizer.image_size, tokenizer.fit, tokenizer.module.encoder.mean)
        codes = editing.as_grid(tokenizer, np.asarray(tokenizer.encode_to_indices(image[None])))[0]
        shown = self._painted(Slot(image, codes, codes, image, np.zeros(0)), codes)
        error = np.mean((shown.painted.astype(np.float64) - image) ** 2)
        decibels = 10 * np.log10(255**2 / max(error, 1e-12))
        message = f"{codes.size} codes of {tokenizer.codebook_size}, {len(np.unique(codes))} different; "
        return _with_slot(empty, slot, shown, message + f"PSNR {decibels:.1f} dB")

    def click(self, session: Session, slot: int, across: float, down: float, painting: bool) -> Session:
        """A click in a slot's reconstruction or codes, at shares of its width and height."""
        if session.slots[slot] is None:
            return session
        side = self.tokenizer.grid
        row, column = (min(max(int(share * side), 0), side - 1) for share in (down, across))
        if not painting:
            return self._look(session, slot, row, column)
        if slot == 1:
            return _select(session, row, column)
        if session.region is None:
            return dataclasses.replace(session, message="Click two corners of a region in the second picture first.")
        first, second = session.slots
        codes = editing.paste(first.codes, second.codes, session.region, (row, column))
        changed = int((codes != first.codes).any(axis=tuple(range(2, codes.ndim))).sum())
        painted = dataclasses.replace(session, slots=(self._painted(first, codes), second), looked=None)
        return dataclasses.replace(painted, message=f"Painted at row {row}, column {column}: {changed} codes changed.")

    def restore(self, session: Session) -> Session:
        """The first picture with its own codes again."""
        first, second = session.slots
        if first is None:
            return session
        slots = (self._painted(first, first.original), second)
        return dataclasses.replace(
            session, slots=slots, looked=None, message="The first picture has its own codes again."
        )

    def show(self, session: Session) -> tuple[np.ndarray | None, ...]:
        """Reconstruction and codes of both slots, and the strip of nearest patches."""
        shown: list[np.ndarray | None] = []
        for i, slot in enumerate(session.slots):
            if slot is None:
                shown += [None, None]
                continue
            boxes = [(r, c, r + 1, c + 1) for s, r, c in [session.looked] if s == i] if session.looked else []
            if i == 1 and session.region:
                boxes.append(session.region)
            if i == 1 and session.corner:
                boxes.append((*session.corner, session.corner[0] + 1, session.corner[1] + 1))
            painted = pictures.enlarged(slot.painted, VIEW)
            codes = pictures.code_map(pictures.square(slot.codes), len(painted))
            shown += [pictures.mark(view, self.tokenizer.grid, boxes) for view in (painted, codes)]
        return (*shown, self._strip(session))

    def _painted(self, slot: Slot, codes: np.ndarray) -> Slot:
        whole = codes.reshape(1, *self.tokenizer.code_shape)
        painted = pictures.to_uint8(self.tokenizer.decode_from_indices(whole))[0]
        latents = np.asarray(self.tokenizer.lookup(whole)).reshape(*codes.shape[:2], -1)
        return dataclasses.replace(slot, codes=codes, painted=painted, latents=latents)

    def _look(self, session: Session, slot: int, row: int, column: int) -> Session:
        code = session.slots[slot].codes[row, column]
        name = str(code) if code.ndim == 0 else ", ".join(map(str, code))
        same = sum(int((s.codes == code).reshape(*s.codes.shape[:2], -1).all(-1).sum()) for s in session.slots if s)
        often = "once" if same == 1 else f"{same} times"
        message = f"Row {row}, column {column}: code **{name}**, {often} here. Below, the patch and those nearest."
        return dataclasses.replace(session, looked=(slot, row, column), message=message)

    def _strip(self, session: Session) -> np.ndarray | None:
        if session.looked is None:
            return None
        slot, row, column = session.looked
        present = [i for i, s in enumerate(session.slots) if s]
        latents = np.stack([session.slots[i].latents for i in present])
        places = [(present.index(slot), row, column)]
        places += editing.nearest_patches(latents, places[0], NEAREST)
        side = self.tokenizer.downsampling
        tiles = [
            session.slots[present[s]].painted[r * side : (r + 1) * side, c * side : (c + 1) * side]
            for s, r, c in places
        ]
        return pictures.strip(tiles, 64)


def blocks(page: Page) -> Any:
    """The page as Gradio's Blocks."""
    gr = _gradio()
    still = {"interactive": False, "format": "png", "buttons": [], "height": HEIGHT}
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as built:
        session = gr.State(Session())
        gr.Markdown(f"# {TITLE}\n{_described(page.tokenizer)}")
        with gr.Row(equal_height=True):
            action = gr.Radio(["look", "paint"], value="look", label="a click will", elem_id="action", scale=1)
            message = gr.Markdown(HELP, elem_id="message", container=True)
            restore = gr.Button("undo painting", elem_id="restore", size="sm", scale=0, min_width=140)
        files, views = [], []
        for i, name in enumerate(("first", "second")):
            with gr.Row():
                upload = {"type": "filepath", "image_mode": None, "sources": ["upload", "clipboard"], "buttons": []}
                files.append(gr.Image(label=f"{name} picture", elem_id=f"upload{i}", height=HEIGHT, **upload))
                views.append(gr.Image(label="reconstruction", elem_id=f"painted{i}", **still))
                views.append(gr.Image(label="codes", elem_id=f"codes{i}", **still))
        nearest = gr.Image(label="the patch and those nearest to it", elem_id="nearest", **{**still, "height": 130})
        outputs = [session, message, *views, nearest]
        event = {"outputs": outputs, "concurrency_id": "model", "api_visibility": "private", "show_progress": "hidden"}

        def result(new: Session) -> tuple[Any, ...]:
            return (new, new.message, *page.show(new))

        def on_load(slot: int) -> Any:
            return lambda now, file: result(page.load(now, slot, file))

        def on_click(view: int) -> Any:
            def click(now: Session, chosen: str, at: gr.SelectData) -> tuple[Any, ...]:
                shown = page.show(now)[view]
                height, width = (1, 1) if shown is None else shown.shape[:2]
                return result(page.click(now, view // 2, at.index[0] / width, at.index[1] / height, chosen == "paint"))

            return click

        for i, file in enumerate(files):
            file.change(on_load(i), [session, file], **event)
        for i, view in enumerate(views):
            view.select(on_click(i), [session, action], **event)
        restore.click(lambda now: result(page.restore(now)), [session], **event)
    return built


def serve(args: argparse.Namespace) -> None:
    """Runs the command until it is interrupted."""
    if not 1 <= args.port <= 65535:
        raise ConfigError(f"--port={args.port}: ports are 1 to 65535")
    with tempfile.TemporaryDirectory(prefix="vqrae-jax-demo-") as folder:
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
        gr = _gradio()
        page = Page(Tokenizer.load(args.checkpoint, args.step, batch_size=1))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the folder goes away then, too
        try:
            _, address, _ = blocks(page).launch(
                server_name=args.host, server_port=args.port, max_file_size=f"{args.max_upload}mb", share=False,
                quiet=True, prevent_thread_lock=True, inbrowser=False, run_history=False, enable_monitoring=False,
                ssr_mode=False, mcp_server=False, footer_links=[],
                theme=gr.themes.Base(font="system-ui", font_mono="monospace"),
            )  # fmt: skip
        except OSError:
            raise ConfigError(
                f"--port={args.port} of --host={args.host} cannot be had: another program serves there, or the address "
                "is not of this machine; give another"
            ) from None
        print(f"serving {address} (Ctrl-C stops)", flush=True)
        threading.Event().wait()


def _described(tokenizer: Tokenizer) -> str:
    size, codes = tokenizer.image_size, tokenizer.codebook_size
    shape = " x ".join(map(str, tokenizer.code_shape))
    return f"{size} x {size} pixels become {shape} codes out of {codes:,}: {tokenizer.bits_per_image:,.0f} bits."


def _with_slot(session: Session, slot: int, shown: Slot | None, message: str) -> Session:
    slots = tuple(shown if i == slot else kept for i, kept in enumerate(session.slots))
    return dataclasses.replace(session, slots=slots, message=message)


def _select(session: Session, row: int, column: int) -> Session:
    """Corner, opposite corner, and from the start again."""
    if session.corner is None:
        message = "Now the opposite corner."
        return dataclasses.replace(session, corner=(row, column), region=None, message=message)
    (top, bottom), (left, right) = sorted((session.corner[0], row)), sorted((session.corner[1], column))
    region = (top, left, bottom + 1, right + 1)
    message = f"{bottom + 1 - top} x {right + 1 - left} codes chosen: click where they go in the first picture."
    return dataclasses.replace(session, corner=None, region=region, message=message)


def _gradio() -> Any:
    try:
        import gradio
    except ImportError:
        raise ConfigError("the page needs Gradio: pip install 'vqrae-jax[demo]'") from None
    return gradio


def main() -> None:
    command.run(lambda: serve(parse()))


if __name__ == "__main__":
    main()
