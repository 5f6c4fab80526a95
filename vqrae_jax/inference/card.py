"""The model card (README.md) of a saved tokenizer."""

import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from vqrae_jax.build.encoder import weights_source
from vqrae_jax.build.generator import arrange_codes
from vqrae_jax.data import images as image_files
from vqrae_jax.evaluation import codebook_health, visualize
from vqrae_jax.evaluation.metrics import psnr
from vqrae_jax.evaluation.report import describe_metric
from vqrae_jax.inference import saving
from vqrae_jax.inference.inputs import FittedImages
from vqrae_jax.pretrained import sources

IMAGE = "reconstructions.png"
MAX_SHOWN = 8  # images in IMAGE

TEMPLATE = """---
library_name: vqrae_jax
license: {license}
pipeline_tag: image-feature-extraction
tags: [jax, flax, image-tokenizer, vqrae]
{base_model}---

# {title}

{summary}

{image}## Use

```bash
pip install vqrae-jax
```

```python
from vqrae_jax import Tokenizer

tokenizer = Tokenizer.load("{name}")
{codes} = tokenizer.{encode}(images)  # images [B, H, W, 3]: uint8, or floats in [0, 1]
images = tokenizer.{decode}({codes})  # [B, {size}, {size}, 3] in [0, 1]
```

## Properties

| property | value |
| --- | --- |
{rows}
{metrics}"""

METRICS = """
## Metrics

{protocol}

| metric | value | meaning |
| --- | --- | --- |
{rows}
"""


def write_card(
    tokenizer: Any, folder: pathlib.Path, name: str, images: FittedImages | None = None, embedded: bool = False
) -> None:
    """Writes README.md to `folder`, and with `images` a figure of their reconstructions and metrics on them.

    `name` is the path or hub id that the example loads. A folder with an `embedded` pretrained encoder, whose license
    is its authors' decision, has the license "other".
    """
    rows, size = _describe(tokenizer), tokenizer.image_size
    if images is not None and len(images):
        rows += _write_figure(tokenizer, folder, images)
    config = tokenizer.config
    if tokenizer.has_codes:
        latent = f"{np.prod(tokenizer.code_shape)} codes of {tokenizer.codebook_size}"
        codes, encode, decode = "indices", "encode_to_indices", "decode_from_indices"
    else:
        latent, codes, encode, decode = "a continuous latent", "latents", "encode", "decode"
    source = weights_source(config)[0] or tokenizer.provenance.get("encoder")
    hub_id = source if source and sources.is_hub_id(source) else None
    encoder = f"a {config.encoder_cls} encoder (`{hub_id or saving.remove_folders(source)}`)"
    if source is None:
        encoder = "a ViT encoder that was trained from random weights"
    text = TEMPLATE.format(
        title=name.rpartition("/")[2], license="other" if embedded and source else "apache-2.0",
        base_model=f"base_model: {hub_id}\n" if hub_id else "",
        name=name, size=size, codes=codes, encode=encode, decode=decode,
        summary=f"Encodes an image to {latent} with {encoder}, and decodes it to {size} x {size} pixels.",
        image=f"![input, reconstruction and codes]({IMAGE})\n\n" if (folder / IMAGE).is_file() else "",
        rows="\n".join(f"| {key} | {value} |" for key, value in rows), metrics=_describe_metrics(tokenizer.provenance),
    )  # fmt: skip
    (folder / "README.md").write_text(text, encoding="utf-8")


def _describe(tokenizer: Any) -> list[tuple[str, Any]]:
    config, provenance, grid = tokenizer.config, tokenizer.provenance, tokenizer.grid
    rows: list[tuple[str, Any]] = [("quantizer", config.quantizer), ("grid", f"{grid} x {grid}" if grid else "none")]
    if tokenizer.has_codes:
        rows += [("bits per image", f"{tokenizer.bits_per_image:.0f}"), ("hash of the codes", f"`{tokenizer.hash}`")]
    rows += [(f"training {key}", provenance[key]) for key in ("step", "version", "revision") if provenance.get(key)]
    if data := provenance.get("data"):
        rows.append(("training data", " ".join(str(value) for value in data.values())))
    return rows


def _describe_metrics(provenance: dict[str, Any]) -> str:
    """Returns the section of the metrics of an evaluation; empty if there was none."""
    if not (metrics := provenance.get("metrics")):
        return ""
    fields = saving.remove_folders(provenance.get("protocol", {}))
    protocol = "; ".join(f"{name}: {fields[name]}" for name in ("data", "images", "crop", "weights") if name in fields)
    protocol = f"Protocol: {protocol}." if protocol else "Of the evaluation during training."
    rows = (
        f"| {name.removeprefix('eval/')} | {value:.4g} | {describe_metric(name)} |" for name, value in metrics.items()
    )
    return METRICS.format(protocol=protocol, rows="\n".join(rows))


def _write_figure(tokenizer: Any, folder: pathlib.Path, images: FittedImages) -> list[tuple[str, Any]]:
    """Plots the first images; returns metrics on all of them."""
    originals = images[:]
    if originals.dtype != np.uint8:
        originals = visualize.to_uint8(originals)
    indices = np.asarray(tokenizer.encode_to_indices(originals)) if tokenizer.has_codes else None
    reconstructions = np.asarray(tokenizer.reconstruct(originals))
    figure = visualize.reconstruction_grid(
        originals[:MAX_SHOWN], visualize.to_uint8(reconstructions[:MAX_SHOWN]),
        None if indices is None else indices[:MAX_SHOWN], tokenizer.grid,
    )  # fmt: skip
    image_files.write_image(folder / IMAGE, figure)
    decibels = np.mean(psnr(jnp.asarray(reconstructions), jnp.asarray(originals / np.float32(255))))
    rows = [(f"PSNR on {len(originals)} images", f"{decibels:.2f} dB")]
    if indices is not None:
        _, levels = arrange_codes(tokenizer.code_shape, tokenizer.module.quantizer.prefixes, tokenizer.grid)
        counts = [np.bincount(level, minlength=tokenizer.codebook_size) for level in indices.reshape(-1, levels).T]
        health = codebook_health.health(np.stack(counts))
        rows.append(("codebook usage on these images", f"{health['usage']:.1%}"))
    return rows
