"""Serves a web page to look at and edit the codes of two images, and to sample from a generator.

vqrae demo --checkpoint=runs/quickstart

A click on a patch shows its code and the patches nearest to it; a mix blends the codes of both images, and regions of
the second can be pasted into it. With --generator=runs/generator the page also samples images of classes and samples
regions of an image again; --checkpoint may then be left out. Only this machine can reach the page unless --host says
otherwise, and only the page itself may send requests: those with another Origin, or to a Host that is not an address
or a name of this machine, are refused.
"""

import argparse
import logging
import pathlib
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vqrae_jax import runtime
from vqrae_jax.commands import command_line, generator_tabs
from vqrae_jax.commands.same_origin import SameOrigin
from vqrae_jax.data import images, photographs
from vqrae_jax.errors import ConfigError, DataError, import_extra
from vqrae_jax.inference.edit_session import FIRST, MIX, SECOND, STEPS, VIEW, Editor, Session
from vqrae_jax.inference.generator import Generator
from vqrae_jax.inference.generator_session import GeneratorActions
from vqrae_jax.inference.tokenizer import Tokenizer

LOOK, PASTE = "look", "paste codes"
TITLE = "Images as codes"
HELP = f"""With **{LOOK}**, click a patch to see its code and the patches nearest to it. With **{PASTE}**, click two
corners of a region in the second image, then a position in the mix. Codes have the color that they decode to."""
NAMES = ("first image", "second image", "mix")  # of the slots of a session
CSS = f"""main {{width: 100% !important; max-width: {3 * VIEW + 32}px !important; margin: auto !important}}
.view img {{image-rendering: pixelated}} .grid-wrap {{overflow: hidden !important; padding: 6px !important}}"""

parser = command_line.Parser("demo", "Serves a web page to edit the codes of images, and to sample from a generator.")
parser.add_checkpoint(required=False)
parser.add("--generator", "workdir, checkpoint, saved folder or hub id of a generator; with its tokenizer by default")
parser.add("--host", "address to serve on; the default is reachable from this machine only", default="127.0.0.1")
parser.add("--port", type=int, default=7860)
parser.add("--allow-host", "other names of this machine or of a proxy in front of it", nargs="+", default=[])
parser.add_count("--max-upload", "largest file in MB", 10)


def load_examples() -> list[np.ndarray]:
    """Returns photographs of the installed packages, first those for validation; none if a package is missing."""
    try:
        return [*photographs.load_photographs("validation"), *photographs.load_photographs("train")][:6]
    except DataError:
        return []


def first_session(editor: Editor, examples: list[np.ndarray]) -> Session:
    """Returns a session with the first two examples."""
    session = Session()
    for slot, image in zip((FIRST, SECOND), examples, strict=False):
        session = editor.load(session, slot, image)
    return session.change(HELP)


def write_archive(session: Session, folder: str) -> str | None:
    """Writes reconstructions and codes of a session as a ZIP file to `folder`; returns its path."""
    slots = {name: slot for name, slot in zip(NAMES, session.slots, strict=True) if slot}
    if not slots:
        return None
    with tempfile.TemporaryDirectory() as content:
        for name, slot in slots.items():
            images.write_image(pathlib.Path(content) / f"{name}.png", slot.reconstruction)
        np.savez(pathlib.Path(content) / "codes.npz", **{name: slot.codes for name, slot in slots.items()})
        return shutil.make_archive(str(pathlib.Path(tempfile.mkdtemp(dir=folder)) / "codes"), "zip", content)


def build_blocks(editor: Editor, folder: str, generator: Generator | None = None) -> Any:
    """Builds the page as Gradio's Blocks; downloads are written to `folder`."""
    gr, examples = import_gradio(), load_examples()
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.Markdown(f"# {TITLE}\n{_summary(editor.tokenizer)}")
        if generator is None:
            _add_codes(gr, editor, examples, folder)
        else:
            with gr.Tabs() as tabs:
                generator_tabs.add_tabs(gr, tabs, GeneratorActions(generator), examples)
                with gr.Tab("Look at codes"):
                    _add_codes(gr, editor, examples, folder)
    return blocks


def _add_codes(gr: Any, editor: Editor, examples: list[np.ndarray], folder: str) -> None:
    """Adds the part of the page in which codes are looked at and edited."""
    initial = first_session(editor, examples)
    values, views, sources = editor.render(initial), {}, []
    session = gr.State(initial)
    with gr.Row(equal_height=True):
        action = gr.Radio([LOOK, PASTE], value=LOOK, label="a click will", elem_id="action", scale=1)
        message = gr.Markdown(HELP, elem_id="message", container=True)
    for slot in (FIRST, SECOND):
        with gr.Row():
            views |= _add_views(gr, slot, ("input", "reconstruction", "codes"), values)
        with gr.Row():
            sources.append(generator_tabs.add_sources(gr, slot, examples))
    with gr.Row():
        with gr.Column(min_width=VIEW // 2):
            gr.Markdown("**Mix of both images' codes**")
            weight = gr.Slider(0, 1, 0, step=1 / STEPS, label="weight of the second", elem_id="blend")
            restore = gr.Button("undo blending and pasting", elem_id="restore", size="sm")
            archive = write_archive(initial, folder)
            download = gr.DownloadButton("download images and codes", archive, elem_id="download", size="sm")
        views |= _add_views(gr, MIX, ("reconstruction", "codes"), values)
    gr.Markdown("**Selected patch, and the patches nearest to it**")
    views["nearest"] = _add_image(gr, "nearest", None, 80)

    def update(old: Session, new: Session) -> tuple[Any, ...]:
        rendered = editor.render(new)
        file = gr.skip() if new.slots == old.slots else write_archive(new, folder)
        return new, new.message, new.weight, file, None, None, *map(rendered.get, views)

    outputs = [session, message, weight, download, *(upload for upload, _ in sources), *views.values()]
    event = {"outputs": outputs, "concurrency_id": "model", "api_visibility": "private", "show_progress": "hidden"}

    def on_upload(slot: int) -> Callable[..., tuple[Any, ...]]:
        return lambda old, file: update(old, editor.load_file(old, slot, file))

    def on_example(slot: int) -> Callable[..., tuple[Any, ...]]:
        def select(old: Session, at: gr.SelectData) -> tuple[Any, ...]:
            return update(old, editor.load(old, slot, examples[at.index]))

        return select

    def on_click(slot: int) -> Callable[..., tuple[Any, ...]]:
        side = -(-VIEW // editor.tokenizer.image_size) * editor.tokenizer.image_size  # pixels of a view

        def click(old: Session, action: str, at: gr.SelectData) -> tuple[Any, ...]:
            act = editor.paste if action == PASTE else editor.select
            return update(old, act(old, slot, at.index[0] / side, at.index[1] / side))

        return click

    for slot, (upload, gallery) in enumerate(sources):
        upload.upload(on_upload(slot), [session, upload], **event)
        gallery.select(on_example(slot), [session], **event)
    for name, view in views.items():
        if name != "nearest":
            view.select(on_click(int(name[-1])), [session, action], **event)
    weight.release(lambda old, value: update(old, editor.blend(old, value)), [session, weight], **event)
    restore.click(lambda old: update(old, editor.restore(old)), [session], **event)


def _summary(tokenizer: Tokenizer) -> str:
    size, shape = tokenizer.image_size, " x ".join(map(str, tokenizer.code_shape))
    bits = tokenizer.bits_per_image
    return (
        f"{size} x {size} pixels become {shape} codes out of {tokenizer.codebook_size:,}: {bits:,.0f} bits, "
        f"{size**2 * 24 / bits:.0f} times fewer than the pixels have."
    )


def _add_views(gr: Any, slot: int, kinds: Sequence[str], values: dict[str, Any]) -> dict[str, Any]:
    """Adds a column with a title for each view of a slot; returns them by the names of `Editor.render`."""
    views = {}
    for kind in kinds:
        with gr.Column(min_width=VIEW // 2):
            gr.Markdown(f"**{NAMES[slot].capitalize()}**" if kind == "input" else f"**{kind.capitalize()}**")
            views[f"{kind}{slot}"] = _add_image(gr, f"{kind}{slot}", values.get(f"{kind}{slot}"), VIEW)
    return views


def _add_image(gr: Any, name: str, value: Any, height: int) -> Any:
    return gr.Image(
        value, elem_id=name, elem_classes="view", height=height, interactive=False, format="png", show_label=False,
        container=False, buttons=[],
    )  # fmt: skip


def serve(args: argparse.Namespace) -> None:
    """Runs the command until it is interrupted."""
    if not 1 <= args.port <= 65535:
        raise ConfigError("expected 1 to 65535", field="--port", value=args.port)
    if not (args.checkpoint or args.generator):
        raise ConfigError("is missing; pass a tokenizer, or a generator as --generator", field="--checkpoint")
    with tempfile.TemporaryDirectory(prefix="vqrae-jax-demo-") as folder:
        runtime.set_environment(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
        gr = import_gradio()
        from starlette.middleware import Middleware  # a part of Gradio

        tokenizer, generator = _load_models(args)
        blocks = build_blocks(Editor(tokenizer), folder, generator)
        names = {name.lower() for name in ("localhost", socket.gethostname(), args.host, *args.allow_host)}
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # removes the folder too
        try:
            _, address, _ = blocks.launch(
                server_name=args.host, server_port=args.port, max_file_size=f"{args.max_upload}mb", share=False,
                quiet=True, prevent_thread_lock=True, inbrowser=False, run_history=False, enable_monitoring=False,
                ssr_mode=False, mcp_server=False, footer_links=[],
                app_kwargs={"middleware": [Middleware(SameOrigin, names)]},
                theme=gr.themes.Base(font="system-ui", font_mono="monospace"), css=CSS,
            )  # fmt: skip
        except OSError:
            message = f"is in use on --host={args.host}, or the address is not of this machine; pass another"
            raise ConfigError(message, field="--port", value=args.port) from None
        print(f"serving {address} (Ctrl-C stops)", flush=True)
        threading.Event().wait()


@command_line.names_arguments({"checkpoint": "--generator", "tokenizer": "--checkpoint"})
def _load_generator(path: str, tokenizer: Tokenizer | None) -> Generator:
    generator = Generator.load(path, tokenizer=tokenizer)
    generator.require_tokenizer()
    return generator


def _load_models(args: argparse.Namespace) -> tuple[Tokenizer, Generator | None]:
    tokenizer = None
    if args.checkpoint:
        tokenizer = Tokenizer.load(args.checkpoint, args.step, encoder=args.encoder, batch_size=1)
    if not args.generator:
        return tokenizer, None
    generator = _load_generator(args.generator, tokenizer)
    return generator.tokenizer, generator


def import_gradio() -> Any:
    """Imports Gradio, which is optional."""
    with import_extra("demo", "the page"):
        import gradio
    return gradio


main = command_line.build_main(parser, serve, logging.WARNING)

if __name__ == "__main__":
    main()
