"""The model card of a saved tokenizer: what it is, its figures, a picture, how to use it."""

import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np

from vqrae_jax import config as config_lib
from vqrae_jax.data import images as image_files
from vqrae_jax.evaluation import codebook_health as codebook
from vqrae_jax.evaluation import visualize as pictures
from vqrae_jax.evaluation.metrics import psnr
from vqrae_jax.inference.inputs import Pictures

if TYPE_CHECKING:
    from vqrae_jax.inference.tokenizer import Tokenizer

PICTURE = "reconstructions.png"
SHOWN = 8  # images in the picture

TEMPLATE = """---
library_name: vqrae_jax
pipeline_tag: image-feature-extraction
tags: [jax, flax, image-tokenizer, vqrae]
---

# {title}

{what}

{picture}```python
from vqrae_jax import Tokenizer

tokenizer = Tokenizer.load("{name}")
{use}
```

| what | value |
| --- | --- |
{rows}
"""

DISCRETE = """indices = tokenizer.encode_to_indices(images)  # images [B, H, W, 3]: uint8, or floats in [0, 1]
pictures = tokenizer.decode_from_indices(indices)  # [B, {size}, {size}, 3] in [0, 1]"""
CONTINUOUS = """latents = tokenizer.encode(images)  # images [B, H, W, 3]: uint8, or floats in [0, 1]
pictures = tokenizer.decode(latents)  # [B, {size}, {size}, 3] in [0, 1]"""


def write(tokenizer: "Tokenizer", folder: pathlib.Path, name: str, images: Pictures | None = None) -> None:
    """Writes README.md to `folder`, for those who load `name`; and with `images` the picture that it shows."""
    discrete, rows = tokenizer.has_codes, _facts(tokenizer)
    if images is not None and len(images):
        rows += _show(tokenizer, folder, images)
    shown = f"![input, reconstruction and codes]({PICTURE})\n\n" if (folder / PICTURE).is_file() else ""
    kind = f"{np.prod(tokenizer.code_shape)} codes of {tokenizer.codebook_size}" if discrete else "a continuous latent"
    what = (
        f"An image becomes {kind} by {_encoder(tokenizer.config)}, "
        f"and a picture of {tokenizer.image_size} x {tokenizer.image_size} pixels is painted from it again."
    )
    text = TEMPLATE.format(
        title=name.rpartition("/")[2], name=name, what=what, picture=shown,
        use=(DISCRETE if discrete else CONTINUOUS).format(size=tokenizer.image_size),
        rows="\n".join(f"| {name} | {value} |" for name, value in rows),
    )  # fmt: skip
    (folder / "README.md").write_text(text, encoding="utf-8")


def _encoder(config: config_lib.ModelConfig) -> str:
    if config.encoder_config_path is None:  # then encoder_cls names only what the ViT is built like
        return "a ViT encoder that started from random weights"
    return f"a {config.encoder_cls} encoder (`{config.encoder_config_path}`)"


def _facts(tokenizer: "Tokenizer") -> list[tuple[str, Any]]:
    config, known = tokenizer.config, tokenizer.provenance
    rows: list[tuple[str, Any]] = [("quantizer", config.quantizer), ("grid", f"{tokenizer.grid} x {tokenizer.grid}")]
    if tokenizer.has_codes:
        rows += [("bits per image", f"{tokenizer.bits_per_image:.0f}"), ("hash of the codes", f"`{tokenizer.hash}`")]
    rows += [(f"trained {name}", known[name]) for name in ("step", "version", "revision") if known.get(name)]
    if data := known.get("data"):
        rows.append(("trained on", " ".join(str(value) for value in data.values())))
    return rows + [(name, f"{value:.4g}") for name, value in known.get("figures", {}).items()]


def _show(tokenizer: "Tokenizer", folder: pathlib.Path, images: Pictures) -> list[tuple[str, Any]]:
    """Draws the first images; figures on all of them."""
    colour = tokenizer.module.encoder.mean
    originals = images.batch(slice(None), tokenizer.image_size, tokenizer.fit, colour)
    if originals.dtype != np.uint8:
        originals = pictures.to_uint8(originals)
    codes = np.asarray(tokenizer.encode_to_indices(originals)) if tokenizer.has_codes else None
    painted = np.asarray(tokenizer.reconstruct(originals))
    chosen = slice(SHOWN)
    drawn = pictures.reconstruction_grid(
        originals[chosen], pictures.to_uint8(painted[chosen]), None if codes is None else codes[chosen], tokenizer.grid
    )
    image_files.write_image(folder / PICTURE, drawn)
    decibels = psnr(painted, originals / np.float32(255))
    rows = [(f"PSNR on the {len(originals)} images given", f"{float(np.mean(decibels)):.2f} dB")]
    if codes is not None:
        used = codebook.health(np.bincount(codes.reshape(-1), minlength=tokenizer.codebook_size))
        rows.append(("codes in use on them", f"{used['usage']:.1%}"))
    return rows
