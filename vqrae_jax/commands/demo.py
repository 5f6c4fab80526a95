"""Serves a web page to look at, compare and edit the codes of two images.

vqrae demo --checkpoint=runs/quickstart

A click on a patch shows its code and the patches nearest to it; a region of the second image's codes can be pasted into
the first. Only this machine can reach the page unless --host says otherwise, and only the page itself may send
requests: those with another Origin, or to a Host that is not an address or a name of this machine, are refused.
"""

import argparse
import contextlib
import dataclasses
import ipaddress
import pathlib
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from vqrae_jax import runtime
from vqrae_jax.commands import command_line
from vqrae_jax.data import images
from vqrae_jax.errors import ConfigError, DataError
from vqrae_jax.evaluation import visualize
from vqrae_jax.inference import editing, inputs
from vqrae_jax.inference.tokenizer import Tokenizer

VIEW = 320  # pixels of an image on the page, at least
HEIGHT = VIEW + 64  # pixels of its box, so that the label does not cover it
NEAREST = 8  # patches shown next to the selected one
LOOK, PASTE = "look", "paste codes"
TITLE = "Images as codes"
HELP = f"""Drop an image into each slot. With **{LOOK}**, click a patch to see its code and the patches nearest to it.
With **{PASTE}**, click two corners of a region in the second image, then a position in the first."""

parser = command_line.Parser("demo", "Serves a web page to look at, compare and edit the codes of images.")
parser.add_checkpoint()
parser.add("--host", "address to serve on; the default is reachable from this machine only", default="127.0.0.1")
parser.add("--port", type=int, default=7860)
parser.add("--allow-host", "other names of this machine or of a proxy in front of it", nargs="+", default=[])
parser.add_count("--max-upload", "largest file in MB", 10)


@dataclasses.dataclass(frozen=True, eq=False)
class Slot:
    """One image on the page."""

    image: np.ndarray  # uint8 [S, S, 3]
    original: np.ndarray  # codes [h, w, *levels] of the image
    codes: np.ndarray  # the same after edits
    reconstruction: np.ndarray  # uint8 [S, S, 3], decoded from `codes`
    latents: np.ndarray  # [h, w, C] of `codes`


@dataclasses.dataclass(frozen=True)
class Session:
    """The state of one visitor; each action returns a new one."""

    slots: tuple[Slot | None, Slot | None] = (None, None)
    selected: tuple[int, int, int] | None = None  # slot, row, column
    corner: tuple[int, int] | None = None  # first corner of a region
    region: editing.Region | None = None  # in the second image
    message: str = HELP

    def change(self, message: str, **fields: Any) -> "Session":
        return dataclasses.replace(self, message=message, **fields)


class Page:
    """The actions of the page as functions of a session, independent of the server."""

    def __init__(self, tokenizer: Tokenizer):
        editing.as_grid(tokenizer, np.zeros(tokenizer.code_shape, np.int32))  # raises if codes have no positions
        self.tokenizer = tokenizer

    def load(self, session: Session, slot: int, file: str | None) -> Session:
        """Loads an image file into a slot; None empties it. A file that is not an image changes only the message."""
        tokenizer = self.tokenizer
        if file is None:
            return _replace_slot(session, slot, None, HELP)
        try:
            image = images.read_image(file)
            image = inputs.fit_image(image, tokenizer.image_size, tokenizer.fit, tokenizer.module.encoder.mean)
        except DataError:
            return session.change(f"**{pathlib.Path(file).name} cannot be read as an image.**")
        codes = editing.as_grid(tokenizer, np.asarray(tokenizer.encode_to_indices(image[None])))[0]
        loaded = self._decode(Slot(image, codes, codes, image, np.zeros(0)), codes)
        error = np.mean((loaded.reconstruction.astype(np.float64) - image) ** 2)
        psnr = 10 * np.log10(255**2 / max(error, 1e-12))
        text = f"{codes.size} codes of {tokenizer.codebook_size}, {len(np.unique(codes))} different; PSNR {psnr:.1f} dB"
        return _replace_slot(session, slot, loaded, text)

    def click(self, session: Session, slot: int, x: float, y: float, paste: bool) -> Session:
        """Handles a click in the reconstruction or codes of a slot; x and y are fractions of width and height."""
        if session.slots[slot] is None:
            return session
        grid = self.tokenizer.grid
        row, column = (min(max(int(fraction * grid), 0), grid - 1) for fraction in (y, x))
        if not paste:
            code = session.slots[slot].codes[row, column]
            name = ", ".join(map(str, np.atleast_1d(code)))
            same = sum((s.codes == code).reshape(*s.codes.shape[:2], -1).all(-1).sum() for s in session.slots if s)
            count = "once" if same == 1 else f"{same} times"
            text = (
                f"Row {row}, column {column}: code **{name}**, used {count}. Below: the patch and those nearest to it."
            )
            return session.change(text, selected=(slot, row, column))
        if slot == 1:
            return _select_region(session, row, column)
        if session.region is None:
            return session.change("Click two corners of a region in the second image first.")
        first, second = session.slots
        codes = editing.paste(first.codes, second.codes, session.region, (row, column))
        changed = (codes != first.codes).any(axis=tuple(range(2, codes.ndim))).sum()
        message = f"Pasted at row {row}, column {column}: {changed} codes changed."
        return session.change(message, slots=(self._decode(first, codes), second), selected=None)

    def restore(self, session: Session) -> Session:
        """Gives the first image its original codes back."""
        first, second = session.slots
        if first is None:
            return session
        slots = self._decode(first, first.original), second
        return session.change("The first image has its original codes again.", slots=slots, selected=None)

    def render(self, session: Session) -> tuple[np.ndarray | None, ...]:
        """Returns reconstruction and code map of both slots, and the nearest patches."""
        views = []
        for i, slot in enumerate(session.slots):
            if slot is None:
                views += [None, None]
                continue
            cells = [session.selected[1:]] if session.selected and session.selected[0] == i else []
            cells += [session.corner] if session.corner and i == 1 else []
            boxes = [(row, column, row + 1, column + 1) for row, column in cells]
            boxes += [session.region] if session.region and i == 1 else []
            reconstruction = visualize.enlarge(slot.reconstruction, VIEW)
            codes = visualize.code_map(visualize.code_grid(slot.codes), len(reconstruction))
            views += [visualize.mark_cells(view, self.tokenizer.grid, boxes) for view in (reconstruction, codes)]
        return (*views, self._nearest_patches(session))

    def _decode(self, slot: Slot, codes: np.ndarray) -> Slot:
        """Returns the slot with other codes."""
        indices = codes.reshape(1, *self.tokenizer.code_shape)
        reconstruction = visualize.to_uint8(self.tokenizer.decode_from_indices(indices))[0]
        latents = np.asarray(self.tokenizer.lookup(indices)).reshape(*codes.shape[:2], -1)
        return dataclasses.replace(slot, codes=codes, reconstruction=reconstruction, latents=latents)

    def _nearest_patches(self, session: Session) -> np.ndarray | None:
        """Returns the selected patch and those whose latents are nearest to it."""
        if session.selected is None:
            return None
        slot, row, column = session.selected
        slots = [content for content in session.slots if content]
        start = (slots.index(session.slots[slot]), row, column)
        nearest = editing.nearest_patches(np.stack([content.latents for content in slots]), start, NEAREST)
        side = self.tokenizer.downsampling
        cells = [(slots[i].reconstruction, y * side, x * side) for i, y, x in (start, *nearest)]
        return visualize.strip([image[y : y + side, x : x + side] for image, y, x in cells], 64)


def _replace_slot(session: Session, slot: int, content: Slot | None, message: str) -> Session:
    slots = tuple(content if i == slot else other for i, other in enumerate(session.slots))
    return session.change(message, slots=slots, selected=None, corner=None, region=None)


def _select_region(session: Session, row: int, column: int) -> Session:
    """Sets the first corner, then the opposite one, then starts again."""
    if session.corner is None:
        return session.change("Now click the opposite corner.", corner=(row, column), region=None)
    (top, bottom), (left, right) = sorted((session.corner[0], row)), sorted((session.corner[1], column))
    region = (top, left, bottom + 1, right + 1)
    message = f"{bottom + 1 - top} x {right + 1 - left} codes selected: click their position in the first image."
    return session.change(message, corner=None, region=region)


def build_blocks(page: Page) -> Any:
    """Builds the page as Gradio's Blocks."""
    gr, tokenizer = import_gradio(), page.tokenizer
    size, shape = tokenizer.image_size, " x ".join(map(str, tokenizer.code_shape))
    codes, bits = f"{shape} codes out of {tokenizer.codebook_size:,}", f"{tokenizer.bits_per_image:,.0f} bits"
    view_size = -(-VIEW // size) * size  # pixels of the images that `Page.render` returns
    output = {"interactive": False, "format": "png", "buttons": [], "height": HEIGHT}
    upload = {"type": "filepath", "image_mode": None, "sources": ["upload", "clipboard"], "buttons": []}
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        session = gr.State(Session())
        gr.Markdown(f"# {TITLE}\n{size} x {size} pixels become {codes}: {bits}.")
        with gr.Row(equal_height=True):
            action = gr.Radio([LOOK, PASTE], value=LOOK, label="on click", elem_id="action", scale=1)
            message = gr.Markdown(HELP, elem_id="message", container=True)
            restore = gr.Button("undo pasting", elem_id="restore", size="sm", scale=0, min_width=140)
        files, views = [], []
        for i, name in enumerate(("first", "second")):
            with gr.Row():
                files.append(gr.Image(label=f"{name} image", elem_id=f"upload{i}", height=HEIGHT, **upload))
                views.append(gr.Image(label="reconstruction", elem_id=f"reconstruction{i}", **output))
                views.append(gr.Image(label="codes", elem_id=f"codes{i}", **output))
        nearest = gr.Image(label="selected and nearest patches", elem_id="nearest", **{**output, "height": 130})
        outputs = [session, message, *views, nearest]
        event = {"outputs": outputs, "concurrency_id": "model", "api_visibility": "private", "show_progress": "hidden"}

        def update(new: Session) -> tuple[Any, ...]:
            return (new, new.message, *page.render(new))

        def on_load(slot: int) -> Callable[..., tuple[Any, ...]]:
            return lambda old, file: update(page.load(old, slot, file))

        def on_click(view: int) -> Callable[..., tuple[Any, ...]]:
            def click(old: Session, action: str, at: gr.SelectData) -> tuple[Any, ...]:
                x, y = (pixel / view_size for pixel in at.index)
                return update(page.click(old, view // 2, x, y, action == PASTE))

            return click

        for i, file in enumerate(files):
            file.change(on_load(i), [session, file], **event)
        for i, view in enumerate(views):
            view.select(on_click(i), [session, action], **event)
        restore.click(lambda old: update(page.restore(old)), [session], **event)
    return blocks


class SameOrigin:
    """ASGI middleware that refuses the requests that `is_same_origin` does not accept, with status 403."""

    def __init__(self, app: Callable[..., Any], names: Collection[str]):
        self._app, self._names = app, names

    async def __call__(self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        from starlette.responses import PlainTextResponse

        app = self._app
        if scope["type"] in ("http", "websocket") and not is_same_origin(scope["headers"], self._names):
            app = PlainTextResponse("This page is not served to other hosts or origins; see --allow-host.", 403)
        await app(scope, receive, send)


def is_same_origin(headers: Iterable[tuple[bytes, bytes]], names: Collection[str]) -> bool:
    """Returns whether a request has one Host that is an address or one of `names`, and no Origin but that Host.

    A page of another site can point its own name at this machine (DNS rebinding), but it cannot be at an address.
    """
    values = {name: [v.decode("latin-1").lower() for n, v in headers if n == name] for name in (b"host", b"origin")}
    with contextlib.suppress(ValueError):  # malformed addresses
        (host,) = values[b"host"]
        name = urlsplit(f"//{host}").hostname
        if all(urlsplit(origin).netloc == host for origin in values[b"origin"]):
            return name in names or bool(ipaddress.ip_address(name or ""))
    return False


def serve(args: argparse.Namespace) -> None:
    """Runs the command until it is interrupted."""
    if not 1 <= args.port <= 65535:
        raise ConfigError("expected 1 to 65535", field="--port", value=args.port)
    with tempfile.TemporaryDirectory(prefix="vqrae-jax-demo-") as folder:
        runtime.set_environment(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
        gr = import_gradio()
        from starlette.middleware import Middleware  # a part of Gradio

        page = Page(Tokenizer.load(args.checkpoint, args.step, batch_size=1))
        names = {name.lower() for name in ("localhost", socket.gethostname(), args.host, *args.allow_host)}
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # removes the folder too
        try:
            _, address, _ = build_blocks(page).launch(
                server_name=args.host, server_port=args.port, max_file_size=f"{args.max_upload}mb", share=False,
                quiet=True, prevent_thread_lock=True, inbrowser=False, run_history=False, enable_monitoring=False,
                ssr_mode=False, mcp_server=False, footer_links=[],
                app_kwargs={"middleware": [Middleware(SameOrigin, names)]},
                theme=gr.themes.Base(font="system-ui", font_mono="monospace"),
            )  # fmt: skip
        except OSError:
            message = f"is in use on --host={args.host}, or the address is not of this machine; pass another"
            raise ConfigError(message, field="--port", value=args.port) from None
        print(f"serving {address} (Ctrl-C stops)", flush=True)
        threading.Event().wait()


def import_gradio() -> Any:
    """Imports Gradio, which is optional."""
    try:
        import gradio
    except ImportError:
        raise ConfigError("the page needs Gradio: pip install 'vqrae-jax[demo]'") from None
    return gradio


main = command_line.build_main(parser, serve)

if __name__ == "__main__":
    main()
