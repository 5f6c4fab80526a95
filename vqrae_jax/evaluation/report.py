"""What --mode=evaluate leaves in the workdir: evaluation.json, and a page of the best, median and worst pictures."""

import html
import json
import re
from typing import Any

import numpy as np

from vqrae_jax import storage
from vqrae_jax.data import images as image_files
from vqrae_jax.evaluation import visualize as pictures
from vqrae_jax.evaluation.evaluate import Example

FOLDER = "evaluation"
EVALUATION_FILE = "evaluation.json"  # of a workdir: the metrics of --mode=evaluate, and their protocol
METRICS_FILE = "metrics.jsonl"  # of a workdir: one JSON object per logged step

# What a figure means, by the end of its name; the longest that fits counts.
MEANINGS = {
    "psnr": "dB over pixels and channels, mean of the pictures; higher is better",
    "ssim": "structural similarity, at most 1; higher is better",
    "lpips": "distance of VGG features; lower is better",
    "rfid": "Frechet distance of Inception features from the pictures before they were coded; lower is better",
    "fid": "Frechet distance of Inception features from the reference; lower is better",
    "rfd": "Frechet distance of features from the pictures before they were coded; lower is better",
    "fd": "Frechet distance of features from the reference; lower is better",
    "kernel": "kernel distance of features, without bias for few pictures; lower is better",
    "cosine": "1 - cosine between features of a picture and of its reconstruction; lower is better",
    "inception_score": "Inception score; higher is better",
    "inception_score_deviation": "its standard deviation over splits",
    "probe_accuracy": "classes that a linear map reads from the quantized latents; higher is better",
    "probe_chance": "the same by always naming the most frequent class",
    "codebook_usage": "share of the codes that occur",
    "codebook_perplexity": "codes, if all that occur were as frequent",
    "codebook_entropy_bits": "per code",
    "codebook_dead": "codes that never occur",
    "bits_per_image": "all codes of the same length",
    "entropy_bits_per_image": "codes as long as their frequency asks",
    "images": "pictures that were measured",
}

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>body {{ font: 15px/1.45 system-ui, sans-serif; color: #223; margin: 2em auto; max-width: 84em; padding: 0 1em }}
table {{ border-collapse: collapse }} td {{ padding: .2em 1.2em .2em 0; border-bottom: 1px solid #e4e6ea }}
td:nth-child(2) {{ text-align: right; font-variant-numeric: tabular-nums }} td:nth-child(3) {{ color: #667 }}
.remark {{ border-left: 4px solid #d1603d; padding-left: 1em }} .kinds {{ display: flex; gap: 2em; flex-wrap: wrap }}
.kinds section {{ flex: 1 1 22em }} figure {{ margin: 0 0 1em }} img {{ width: 100%; image-rendering: pixelated }}
figcaption {{ color: #667; font-size: 13px }} pre {{ white-space: pre-wrap; font-size: 13px }}</style>
<h1>{title}</h1>
<table>{figures}</table>
{remarks}
<h2>Reconstructions</h2><p>Input, reconstruction, absolute difference times {gain}; ranked by {rank}.
<div class="kinds">{pictures}</div>
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
    """Writes workdir/evaluation.json, and workdir/evaluation/index.html with a PNG per example."""
    told = {"step": step, "figures": figures, "remarks": remarks, "protocol": protocol}
    storage.write_bytes(workdir / EVALUATION_FILE, (json.dumps(told, indent=2) + "\n").encode())
    for kind, found in examples.items():
        for number, example in enumerate(found):
            image_files.write_image(workdir / FOLDER / _file(kind, number), _strip(example))
    page = _PAGE.format(
        title=f"{html.escape(workdir.name)}, step {step}",
        figures="".join(_row(name.removeprefix("eval/"), value) for name, value in figures.items()),
        remarks="".join(f'<p class="remark">{html.escape(remark)}' for remark in remarks),
        gain=pictures.GAIN,
        rank="LPIPS" if "eval/lpips" in figures else "PSNR",
        pictures="".join(_section(kind, found) for kind, found in examples.items()),
        protocol=html.escape(json.dumps(protocol, indent=2)),
    )
    storage.write_bytes(workdir / FOLDER / "index.html", page.encode())


def _row(name: str, value: float) -> str:
    return f"<tr><td>{name}<td>{_short(value)}<td>{_meaning(name)}"


def _strip(example: Example) -> np.ndarray:
    image, painted = example.image[None], pictures.to_uint8(example.reconstruction)[None]
    return pictures.reconstruction_grid(image, painted, None, columns=1, show=("input", "reconstruction", "difference"))


def _section(kind: str, found: list[Example]) -> str:
    rows = "".join(
        f'<figure><img src="{_file(kind, number)}" alt="{kind} reconstruction {number}"><figcaption>image {e.index}: '
        + ", ".join(f"{name} {_short(value)}" for name, value in e.scores.items())
        + "</figcaption></figure>\n"
        for number, e in enumerate(found)
    )
    return f"<section><h3>{kind.capitalize()}</h3>{rows}</section>\n"


def _file(kind: str, number: int) -> str:
    return f"{kind}{number}.png"


def _meaning(name: str) -> str:
    fitting = [end for end in MEANINGS if re.search(rf"(^|[/_]){end}$", name)]
    return MEANINGS[max(fitting, key=len)] if fitting else ""


def _short(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
