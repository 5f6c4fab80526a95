"""The parts of the web page that use a generator: samples of classes, and regions of images that are sampled again."""

from collections.abc import Callable
from typing import Any, get_args

import numpy as np

from vqrae_jax.data import images
from vqrae_jax.generation.sampler_config import Method
from vqrae_jax.inference.edit_session import VIEW
from vqrae_jax.inference.generator_session import ALL, ANY, REGION, GeneratorActions, Repaint, Samples

COUNTS = (1, 4, 8, 16)  # images; each number is compiled once
VIEWS = {"before": "Before: click two corners", "hidden": "What the generator sees", "after": "After"}


def add_tabs(gr: Any, tabs: Any, actions: GeneratorActions, examples: list[np.ndarray]) -> None:
    """Adds the tabs "Generate" and "Repaint" to Gradio's `tabs`."""
    with gr.Tab("Generate", id="generate"):
        samples = gr.State(Samples())
        settings = _add_settings(gr, actions, "generate", ALL)
        with gr.Row(equal_height=True):
            message = gr.Markdown("Choose a class and press **generate**.", elem_id="generate-message", container=True)
            run = gr.Button("generate", variant="primary", elem_id="generate", min_width=120, scale=0)
            use = gr.Button("repaint selected", elem_id="use", min_width=210, scale=0)
        gallery = gr.Gallery(
            elem_id="samples", columns=4, height="auto", object_fit="contain", allow_preview=False, show_label=False,
            buttons=[], format="png", elem_classes="view", interactive=False,
        )  # fmt: skip
        gr.Markdown("**Steps of the selected sample**: hidden codes are gray", visible=actions.has_steps)
        steps = gr.Image(
            elem_id="steps", show_label=False, container=False, buttons=[], format="png", interactive=False,
            visible=actions.has_steps,
        )  # fmt: skip
    with gr.Tab("Repaint", id="repaint"):
        initial = actions.load(examples[0]) if examples else Repaint(message=REGION)
        repaint, rendered = gr.State(initial), actions.render(initial)
        choices = _add_settings(gr, actions, "repaint", ANY)
        with gr.Row(equal_height=True):
            answer = gr.Markdown(initial.message, elem_id="repaint-message", container=True)
            again = gr.Button("repaint", variant="primary", elem_id="repaint", min_width=120, scale=0)
        views = {}
        with gr.Row():
            for name, title in VIEWS.items():
                with gr.Column(min_width=VIEW // 2):
                    gr.Markdown(f"**{title}**")
                    views[name] = gr.Image(
                        rendered.get(name), elem_id=name, elem_classes="view", height=VIEW, interactive=False,
                        format="png", show_label=False, container=False, buttons=[],
                    )  # fmt: skip
        with gr.Row():
            upload, pictures = add_sources(gr, "repaint", examples)

    event = {"concurrency_id": "model", "api_visibility": "private", "show_progress": "hidden"}
    slow = event | {"show_progress": "minimal"}

    def sample(old: Samples, *values: Any) -> tuple[Any, ...]:
        new = actions.sample(old, **_arguments(settings, values))
        if new.images is old.images:
            return new, new.message, gr.skip(), gr.skip()
        captions = new.captions or [None] * len(new.images)
        shown = gr.Gallery(list(zip(new.images, captions, strict=True)), selected_index=0)
        return new, new.message, shown, actions.show_steps(new)

    def choose(old: Samples, at: gr.SelectData) -> tuple[Any, ...]:
        new = actions.choose(old, at.index)
        return new, actions.show_steps(new)

    def show(new: Repaint) -> tuple[Any, ...]:
        return new, new.message, None, *map(actions.render(new).get, views)

    def change(action: Callable[..., Repaint]) -> Callable[..., tuple[Any, ...]]:
        return lambda *args: show(action(*args))

    def click(old: Repaint, at: gr.SelectData) -> tuple[Any, ...]:
        side = -(-VIEW // actions.tokenizer.image_size) * actions.tokenizer.image_size  # pixels of a view
        return show(actions.select(old, at.index[0] / side, at.index[1] / side))

    def example(at: gr.SelectData) -> tuple[Any, ...]:
        return show(actions.load(examples[at.index]))

    def again_with(old: Repaint, *values: Any) -> tuple[Any, ...]:
        return show(actions.repaint(old, **_arguments(choices, values)))

    shown = [repaint, answer, upload, *views.values()]
    run.click(
        sample, [samples, *settings.values()], [samples, message, gallery, steps], show_progress_on=message, **slow
    )
    gallery.select(choose, [samples], [samples, steps], **event)
    loaded = use.click(change(actions.load_sample), [repaint, samples], shown, **event)
    loaded.then(lambda: gr.Tabs(selected="repaint"), outputs=[tabs], api_visibility="private")
    upload.upload(change(actions.load_file), [repaint, upload], shown, **event)
    pictures.select(example, None, shown, **event)
    views["before"].select(click, [repaint], shown, **event)
    again.click(again_with, [repaint, *choices.values()], shown, show_progress_on=answer, **slow)


def _add_settings(gr: Any, actions: GeneratorActions, tab: str, first: str) -> dict[str, Any]:
    """Adds a row with the arguments of the generator that a visitor chooses; returns the components by argument."""
    generator, sampler = actions.generator, actions.generator.sampler
    classes = [(generator.class_name(i), i) for i in range(generator.config.classes)]
    names = dict.fromkeys((first, ANY))  # every class in turn is not for one image
    with gr.Row():
        components = {
            "label": gr.Dropdown(
                [*((name, name) for name in names), *classes], value=first if classes else ANY, label="class", scale=3,
                allow_custom_value=True, visible=bool(classes), elem_id=f"{tab}-class",
            ),
            "seed": gr.Number(0, label="seed", precision=0, min_width=90, elem_id=f"{tab}-seed"),
            "guidance": gr.Number(
                sampler.guidance, label="guidance", min_width=90, visible=bool(classes), elem_id=f"{tab}-guidance"
            ),
            "steps": gr.Number(
                sampler.steps, label="steps", precision=0, min_width=90, visible=actions.has_steps,
                elem_id=f"{tab}-steps",
            ),
            "sampler": gr.Dropdown(
                list(get_args(Method)), value=sampler.method, label="method", min_width=130, scale=2,
                visible=actions.has_steps, elem_id=f"{tab}-sampler",
            ),
        }  # fmt: skip
        if tab == "generate":
            components["count"] = gr.Dropdown(
                list(COUNTS), value=8, label="images", min_width=90, elem_id=f"{tab}-count"
            )
    return components


def _arguments(components: dict[str, Any], values: tuple[Any, ...]) -> dict[str, Any]:
    """Returns the values of components by name; an empty seed is 0, and other empty fields are the generator's."""
    arguments = dict(zip(components, values, strict=True))
    return arguments | {"seed": arguments["seed"] or 0}


def add_sources(gr: Any, name: str | int, examples: list[np.ndarray]) -> tuple[Any, Any]:
    """Adds a place for files and a gallery of examples."""
    upload = gr.File(elem_id=f"upload{name}", show_label=False, height=130, scale=1)
    gallery = gr.Gallery(
        [images.center_crop(image, 96) for image in examples], elem_id=f"examples{name}", height=130, scale=2,
        columns=max(len(examples), 1), allow_preview=False, show_label=False, buttons=[], object_fit="cover",
        visible=bool(examples),
    )  # fmt: skip
    return upload, gallery
