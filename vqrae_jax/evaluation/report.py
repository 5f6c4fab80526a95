"""Reports as web pages, and that of --mode=evaluate: evaluation.json, and the best, median and worst images."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vqrae_jax import storage
from vqrae_jax.data import images as image_files
from vqrae_jax.evaluation import visualize
from vqrae_jax.evaluation.evaluator import EvaluationResult, Example

FOLDER = "evaluation"
EVALUATION_FILE = "evaluation.json"  # in a workdir: the metrics of --mode=evaluate and their protocol
METRICS_FILE = "metrics.jsonl"  # in a workdir: one JSON object per logged step

DESCRIPTIONS = {  # by the last words of a metric's name; the longest match counts
    "psnr": "dB over pixels and channels, mean over the images; higher is better",
    "ssim": "structural similarity, at most 1; higher is better",
    "seams": "differences across patch borders relative to those inside; 1 in the originals; tiles and blur raise it",
    "lpips": "perceptual distance in VGG features; lower is better",
    "rsfid": "Fréchet distance of Inception's spatial features between reconstructions and originals; lower is better",
    "sfid": "Fréchet distance of Inception's spatial features to the reference; lower is better",
    "rprecision": "share of the reconstructions that are near an original, in features; higher is better",
    "rrecall": "share of the originals that are near a reconstruction, in features; higher is better",
    "precision": "share of the images that are near one of the reference, in features; higher is better",
    "recall": "share of the reference that is near one of the images, in features; higher is better",
    "rfid": "Fréchet distance of Inception features between reconstructions and originals; lower is better",
    "fid": "Fréchet distance of Inception features to the reference; lower is better",
    "rfd": "Fréchet distance of features between reconstructions and originals; lower is better",
    "fd": "Fréchet distance of features to the reference; lower is better",
    "kernel": "kernel distance of features between reconstructions and originals, unbiased; lower is better",
    "cosine": "1 - cosine similarity of the features of an image and its reconstruction; lower is better",
    "feature_distance": "1 - cosine similarity of the encoder's tokens of image and reconstruction; lower is better",
    "inception_score": "Inception score; higher is better",
    "inception_score_deviation": "standard deviation of the Inception score over splits",
    "probe_accuracy": "accuracy of a linear classifier on the quantized latents; higher is better",
    "probe_chance": "accuracy of always predicting the most frequent class",
    "usage": "share of the codes that occur",
    "perplexity": "2 to the power of the entropy of the codes, at most the codebook size",
    "entropy_bits": "entropy of the codes, in bits per code",
    "dead": "number of codes that never occur",
    "bits_per_code": "of the codes under the generator, for masked diffusion an upper bound; lower is better",
    "token_accuracy": "share of hidden or next codes that the generator predicts as the most probable",
    "bits_per_image": "with codes of equal length",
    "entropy_bits_per_image": "with an ideal entropy code",
    "images": "number of images",
    "codes": "size of the codebook",
    "quantization_error": "mean squared error of the quantized latents, relative to their variance; lower is better",
    "code_distance": "mean distance from a code in use to the nearest other one",
    "code_distance_median": "median of these distances",
    "code_distance_min": "smallest of these distances; near 0 for codes that say the same",
}

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>body {{ font: 15px/1.45 system-ui, sans-serif; color: #223; margin: 2em auto; max-width: 84em; padding: 0 1em }}
table {{ border-collapse: collapse }} td {{ padding: .2em 1.2em .2em 0; border-bottom: 1px solid #e4e6ea }}
td:nth-child(2) {{ text-align: right; font-variant-numeric: tabular-nums }} td:nth-child(3) {{ color: #667 }}
.warning {{ border-left: 4px solid #d1603d; padding-left: 1em }} .groups {{ display: flex; gap: 2em; flex-wrap: wrap }}
.groups section {{ flex: 1 1 22em }} .wide section {{ flex-basis: 34em }} p {{ max-width: 50em }}
figure {{ margin: 0 0 1em }} img {{ max-width: 100% }} .pixels img {{ width: 100%; image-rendering: pixelated }}
.columns {{ display: flex; font-size: 13px }} .columns span {{ flex: 1 }} summary {{ cursor: pointer }}
figcaption {{ color: #667; font-size: 13px }} pre {{ white-space: pre-wrap; font-size: 13px }}</style>
<h1>{title}</h1>
<table>{metrics}</table>
{warnings}
{body}
</html>
"""
_EXAMPLES = """<h2>Reconstructions</h2><p>The best, median and worst images by {rank}.
<div class="groups pixels">{examples}</div>
{protocol}"""
_PROTOCOL = """<h2>Protocol</h2>
<details><summary>how these values were measured</summary><pre>{protocol}</pre></details>"""


def render_page(title: str, metrics: Mapping[str, int | float], warnings: Sequence[str], body: str) -> bytes:
    """Returns a web page with a table of metrics and their DESCRIPTIONS; `body` is HTML, the other texts are not."""
    rows = (f"<tr><td>{n.removeprefix('eval/')}<td>{_format(x)}<td>{describe_metric(n)}" for n, x in metrics.items())
    alerts = (f'<p class="warning">{html.escape(warning)}' for warning in warnings)
    page = _PAGE.format(title=html.escape(title), metrics="".join(rows), warnings="".join(alerts), body=body)
    return page.encode()


def write_report(
    workdir: storage.Path, step: int | None, result: EvaluationResult, protocol: dict[str, Any],
    examples: dict[str, list[Example]],
) -> None:  # fmt: skip
    """Writes workdir/evaluation.json, and workdir/evaluation/index.html with a PNG per example."""
    for group, members in examples.items():
        for number, example in enumerate(members):
            image_files.write_image(workdir / FOLDER / f"{group}{number}.png", _example_strip(example))
    body = _EXAMPLES.format(
        rank="LPIPS" if "eval/lpips" in result.metrics else "PSNR",
        examples="".join(_example_section(group, members) for group, members in examples.items()),
        protocol=_PROTOCOL.format(protocol=html.escape(json.dumps(protocol, indent=2))),
    )
    _write_files(workdir, step, result.metrics, result.accumulator.warnings, {"protocol": protocol}, body)


def write_sample_report(
    workdir: storage.Path, step: int, metrics: Mapping[str, int | float], warnings: Sequence[str],
    content: dict[str, Any], pictures: Mapping[str, bytes],
) -> None:  # fmt: skip
    """Writes the files of `write_report` for a generator; `content` is stored, and `pictures` are PNGs by title."""
    figures = []
    for number, (title, picture) in enumerate(pictures.items()):
        storage.write_bytes(workdir / FOLDER / f"picture{number}.png", picture)
        figures.append(f'<h2>{html.escape(title)}</h2><img src="picture{number}.png" alt="{html.escape(title)}">')
    body = "\n".join([*figures, _PROTOCOL.format(protocol=html.escape(json.dumps(content, indent=2)))])
    _write_files(workdir, step, metrics, warnings, content, body)


def _write_files(
    workdir: storage.Path, step: int | None, metrics: Mapping[str, int | float], warnings: Sequence[str],
    content: dict[str, Any], body: str,
) -> None:  # fmt: skip
    content = {"step": step, "metrics": metrics, "warnings": warnings, **content}
    storage.write_bytes(workdir / EVALUATION_FILE, (json.dumps(content, indent=2) + "\n").encode())
    title = workdir.name if step is None else f"{workdir.name}, step {step}"
    storage.write_bytes(workdir / FOLDER / "index.html", render_page(title, metrics, warnings, body))


def _example_strip(example: Example) -> np.ndarray:
    reconstruction = visualize.to_uint8(example.reconstruction)
    tiles = [example.image, reconstruction, visualize.difference_map(example.image, reconstruction)]
    return visualize.strip(tiles, visualize.TILE)


def _example_section(group: str, examples: list[Example]) -> str:
    figures = "".join(
        f'<figure><img src="{group}{number}.png" alt="{group} reconstruction {number}"><figcaption>image {e.index}: '
        + ", ".join(f"{name} {_format(value)}" for name, value in e.scores.items())
        + "</figcaption></figure>\n"
        for number, e in enumerate(examples)
    )
    titles = "".join(f"<span>{visualize.TITLES.get(kind, kind)}</span>" for kind in visualize.KINDS[:3])
    return f'<section><h3>{group.capitalize()}</h3><div class="columns">{titles}</div>{figures}</section>\n'


def describe_metric(name: str) -> str:
    """Returns an explanation of a metric for reports; empty for one without."""
    matches = [end for end in DESCRIPTIONS if re.search(rf"(^|[/_]){end}$", name)]
    return DESCRIPTIONS[max(matches, key=len)] if matches else ""


def _format(value: float | int) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
