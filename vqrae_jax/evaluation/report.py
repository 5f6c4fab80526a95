"""The files of --mode=evaluate in a workdir: evaluation.json, and a page with the best, median and worst images."""

import html
import json
import re
from typing import Any

import numpy as np

from vqrae_jax import storage
from vqrae_jax.data import images as image_files
from vqrae_jax.evaluation import visualize
from vqrae_jax.evaluation.evaluate import EvaluationResult, Example

FOLDER = "evaluation"
EVALUATION_FILE = "evaluation.json"  # in a workdir: the metrics of --mode=evaluate and their protocol
METRICS_FILE = "metrics.jsonl"  # in a workdir: one JSON object per logged step

DESCRIPTIONS = {  # by the last words of a metric's name; the longest match counts
    "psnr": "dB over pixels and channels, mean over the images; higher is better",
    "ssim": "structural similarity, at most 1; higher is better",
    "lpips": "perceptual distance in VGG features; lower is better",
    "rfid": "Fréchet distance of Inception features between reconstructions and originals; lower is better",
    "fid": "Fréchet distance of Inception features between reconstructions and the reference; lower is better",
    "rfd": "Fréchet distance of features between reconstructions and originals; lower is better",
    "fd": "Fréchet distance of features between reconstructions and the reference; lower is better",
    "kernel": "kernel distance of features between reconstructions and originals, unbiased; lower is better",
    "cosine": "1 - cosine similarity of the features of an image and its reconstruction; lower is better",
    "inception_score": "Inception score; higher is better",
    "inception_score_deviation": "standard deviation of the Inception score over splits",
    "probe_accuracy": "accuracy of a linear classifier on the quantized latents; higher is better",
    "probe_chance": "accuracy of always predicting the most frequent class",
    "codebook_usage": "share of the codes that occur",
    "codebook_perplexity": "2 to the power of the entropy of the codes, at most the codebook size",
    "codebook_entropy_bits": "entropy of the codes, in bits per code",
    "codebook_dead": "number of codes that never occur",
    "bits_per_image": "with codes of equal length",
    "entropy_bits_per_image": "with an ideal entropy code",
    "images": "number of images evaluated",
}

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>body {{ font: 15px/1.45 system-ui, sans-serif; color: #223; margin: 2em auto; max-width: 84em; padding: 0 1em }}
table {{ border-collapse: collapse }} td {{ padding: .2em 1.2em .2em 0; border-bottom: 1px solid #e4e6ea }}
td:nth-child(2) {{ text-align: right; font-variant-numeric: tabular-nums }} td:nth-child(3) {{ color: #667 }}
.warning {{ border-left: 4px solid #d1603d; padding-left: 1em }} .groups {{ display: flex; gap: 2em; flex-wrap: wrap }}
.groups section {{ flex: 1 1 22em }} figure {{ margin: 0 0 1em }} img {{ width: 100%; image-rendering: pixelated }}
figcaption {{ color: #667; font-size: 13px }} pre {{ white-space: pre-wrap; font-size: 13px }}</style>
<h1>{title}</h1>
<table>{metrics}</table>
{warnings}
<h2>Reconstructions</h2><p>Original, reconstruction, and absolute difference times {gain}; ranked by {rank}.
<div class="groups">{examples}</div>
<h2>Protocol</h2><pre>{protocol}</pre>
</html>
"""


def write_report(
    workdir: storage.Path, step: int, result: EvaluationResult, protocol: dict[str, Any],
    examples: dict[str, list[Example]],
) -> None:  # fmt: skip
    """Writes workdir/evaluation.json, and workdir/evaluation/index.html with a PNG per example."""
    content = {"step": step, "metrics": result.metrics, "warnings": result.accumulator.warnings, "protocol": protocol}
    storage.write_bytes(workdir / EVALUATION_FILE, (json.dumps(content, indent=2) + "\n").encode())
    for group, members in examples.items():
        for number, example in enumerate(members):
            image_files.write_image(workdir / FOLDER / f"{group}{number}.png", _example_strip(example))
    page = _PAGE.format(
        title=f"{html.escape(workdir.name)}, step {step}",
        metrics="".join(
            f"<tr><td>{name.removeprefix('eval/')}<td>{_format(value)}<td>{_description(name)}"
            for name, value in result.metrics.items()
        ),
        warnings="".join(f'<p class="warning">{html.escape(warning)}' for warning in result.accumulator.warnings),
        gain=visualize.GAIN,
        rank="LPIPS" if "eval/lpips" in result.metrics else "PSNR",
        examples="".join(_example_section(group, members) for group, members in examples.items()),
        protocol=html.escape(json.dumps(protocol, indent=2)),
    )
    storage.write_bytes(workdir / FOLDER / "index.html", page.encode())


def _example_strip(example: Example) -> np.ndarray:
    columns = ("input", "reconstruction", "difference")
    reconstruction = visualize.to_uint8(example.reconstruction)[None]
    return visualize.reconstruction_grid(example.image[None], reconstruction, None, columns=1, show=columns)


def _example_section(group: str, examples: list[Example]) -> str:
    figures = "".join(
        f'<figure><img src="{group}{number}.png" alt="{group} reconstruction {number}"><figcaption>image {e.index}: '
        + ", ".join(f"{name} {_format(value)}" for name, value in e.scores.items())
        + "</figcaption></figure>\n"
        for number, e in enumerate(examples)
    )
    return f"<section><h3>{group.capitalize()}</h3>{figures}</section>\n"


def _description(name: str) -> str:
    matches = [end for end in DESCRIPTIONS if re.search(rf"(^|[/_]){end}$", name)]
    return DESCRIPTIONS[max(matches, key=len)] if matches else ""


def _format(value: float | int) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
