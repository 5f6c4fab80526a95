"""What --mode=evaluate leaves in the workdir: evaluation.json, and a page of the best, median and worst pictures."""

import html
import json
from typing import Any

import numpy as np

from vqrae_jax import storage
from vqrae_jax.data import images as image_files
from vqrae_jax.inference import pictures
from vqrae_jax.train.measurement import Example

FILE, FOLDER = "evaluation.json", "evaluation"

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 15px/1.4 sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em }}
table {{ border-collapse: collapse }} td {{ padding: .15em 1em .15em 0; vertical-align: top }}
img {{ max-width: 100% }} pre {{ white-space: pre-wrap }}</style>
<h1>{title}</h1>
<table>{figures}</table>
{remarks}{pictures}
<h2>Protocol</h2><pre>{protocol}</pre>
</html>
"""


def write(
    workdir: storage.Path,
    step: int,
    figures: dict[str, float],
    remarks: list[str],
    protocol: dict[str, Any],
    examples: dict[str, list[Example]],
) -> None:
    """Writes workdir/evaluation.json, and workdir/evaluation/index.html with a PNG per kind of example."""
    told = {"step": step, "figures": figures, "remarks": remarks, "protocol": protocol}
    storage.write(workdir / FILE, (json.dumps(told, indent=2) + "\n").encode())
    for kind, found in examples.items():
        images, painted = np.stack([e.image for e in found]), np.stack([e.reconstruction for e in found])
        rows = pictures.reconstruction_grid(
            images, pictures.to_uint8(painted), None, columns=1, shown=("input", "reconstruction", "difference")
        )
        image_files.write_image(workdir / FOLDER / f"{kind}.png", rows)
    page = _PAGE.format(
        title=f"{html.escape(workdir.name)}, step {step}",
        figures="".join(f"<tr><td>{name}<td>{_short(value)}" for name, value in figures.items()),
        remarks="".join(f"<p><b>{html.escape(remark)}</b>" for remark in remarks),
        pictures="".join(_section(kind, found) for kind, found in examples.items()),
        protocol=html.escape(json.dumps(protocol, indent=2)),
    )
    storage.write(workdir / FOLDER / "index.html", page.encode())


def _section(kind: str, found: list[Example]) -> str:
    rows = "".join(
        f"<tr><td>image {e.index}" + "".join(f"<td>{n} {_short(v)}" for n, v in e.scores.items()) for e in found
    )
    title = f"<h2>{kind.capitalize()}</h2><p>Input, reconstruction, absolute difference times {pictures.GAIN}"
    return f'{title}<p><img src="{kind}.png" alt="{kind} reconstructions"><table>{rows}</table>\n'


def _short(value: float) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
