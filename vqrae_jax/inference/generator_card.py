"""The model card (README.md) of a saved generator."""

import pathlib
from typing import Any

import numpy as np

from vqrae_jax.data import images as image_files
from vqrae_jax.evaluation import visualize
from vqrae_jax.evaluation.report import describe_metric
from vqrae_jax.inference import saving

IMAGE, SHOWN = "samples.png", 8

TEMPLATE = """---
library_name: vqrae_jax
license: apache-2.0
pipeline_tag: {tag}
tags: [jax, flax, image-generation, vqrae]
---

# {title}

Generates images {condition} by {family} over {length} codes of {codes}.

{image}## Use

```bash
pip install vqrae-jax
```

```python
from vqrae_jax import Generator

generator = Generator.load("{name}")
images = generator.generate(labels={labels}, seed=0)  # [B, {size}, {size}, 3] in [0, 1]
```

## Properties

| property | value |
| --- | --- |
{rows}
"""


def write_card(generator: Any, folder: pathlib.Path, name: str) -> None:
    """Writes README.md to `folder`, with samples of evenly spaced classes if there is a tokenizer.

    `name` is the path or hub id that the example loads.
    """
    config, tokenizer, provenance = generator.config, generator.tokenizer, generator.provenance
    labels = [i * max(config.classes, 1) // SHOWN for i in range(SHOWN)] if config.classes else None
    if tokenizer is not None:
        images = visualize.to_uint8(generator.generate(labels, count=SHOWN))
        names = labels and [generator.class_name(label) for label in labels]
        image_files.write_image(folder / IMAGE, visualize.sample_grid(images, names))
    rows = [(n, getattr(config, n)) for n in ("width", "depth", "heads", "classes", "dtype")]
    rows += [("hash of the tokenizer", f"`{config.tokenizer_hash}`"), ("tokenizer", f"`{config.tokenizer}`")]
    rows += [(f"training {key}", provenance[key]) for key in ("step", "version", "revision") if provenance.get(key)]
    metrics = provenance.get("metrics", {})
    rows += [(f"{n.removeprefix('eval/')}: {describe_metric(n)}", f"{value:.4g}") for n, value in metrics.items()]
    text = TEMPLATE.format(
        tag="unconditional-image-generation" if not config.classes else "text-to-image", title=name.rpartition("/")[2],
        condition=f"of {config.classes} classes" if config.classes else "without classes",
        family="masked diffusion" if config.family == "masked" else "autoregression",
        length=np.prod(generator.code_shape), codes=config.num_embeddings, name=name,
        labels=list(range(min(config.classes, 2))) or None, size=tokenizer.image_size if tokenizer else "S",
        image=f"![samples]({IMAGE})\n\n" if (folder / IMAGE).is_file() else "",
        rows="\n".join(f"| {key} | {saving.remove_folders(str(value))} |" for key, value in rows),
    )  # fmt: skip
    (folder / "README.md").write_text(text, encoding="utf-8")
