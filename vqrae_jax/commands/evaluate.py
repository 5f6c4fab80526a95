"""Measures tokenizers on a folder of images: at their full rates, or at all rates and next to JPEG and WebP.

vqrae evaluate --checkpoint=runs/quickstart --images=/data/val --frontier --output=frontier

With --frontier it writes frontier.json, all values and how they were measured, and frontier.png, which plots them over
bits per image. Images are cropped as in evaluation: the central square, resized to the tokenizer's size.
"""

import argparse
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vqrae_jax import storage
from vqrae_jax.build import judges
from vqrae_jax.commands import command_line
from vqrae_jax.config import EvaluationConfig, PerceptualConfig
from vqrae_jax.data import pipeline
from vqrae_jax.errors import ConfigError
from vqrae_jax.evaluation import frontier, visualize
from vqrae_jax.inference.tokenizer import Tokenizer

ARGUMENTS = command_line.DATA_ARGUMENTS | dict.fromkeys(("data.eval_path", "data.path", "--data"), "--images")
ARGUMENTS |= dict.fromkeys(("loss.perceptual.trunk", "loss.perceptual.heads"), "--lpips")

TITLES = {"psnr": "PSNR", "ssim": "SSIM", "feature_distance": "Feature distance", "lpips": "LPIPS"}  # in frontier.png
UNITS = {
    "PSNR": "dB, higher is better", "SSIM": "higher is better", "LPIPS": "lower is better",
    "Feature distance": "1 - cosine, lower is better",
}  # fmt: skip
MARGIN = 4  # curves of codecs end at this multiple of the largest rate, or of their own beginning

parser = command_line.Parser("evaluate", __doc__.partition("\n\n")[0])
parser.add_checkpoint(nargs="+")
parser.add("--images", "folder of images, flat or in class subfolders", required=True, dest="data")
parser.set_defaults(source="folder", name=None, split="train", image_key=None, label_key=None)
parser.add("--frontier", "measure all rates, JPEG and WebP, and plot them", action="store_true")
parser.add("--output", "with --frontier: folder for frontier.json and frontier.png")
parser.add("--lpips", "files or hub ids of LPIPS's VGG16 and heads", nargs=2, metavar=("TRUNK", "HEADS"))
parser.add_max_pixels()
parser.add_batch_and_limit(16)


@command_line.names_arguments(ARGUMENTS)
def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the command; returns the content of frontier.json."""
    if args.frontier != bool(args.output):
        raise ConfigError("names the folder of --frontier: pass both or none", field="--output", value=args.output)
    output = command_line.output_folder(args.output) if args.output else None
    tokenizers = {
        name: Tokenizer.load(path, args.step, encoder=args.encoder, batch_size=args.batch)
        for name, path in zip(command_line.short_names(args.checkpoint), args.checkpoint, strict=True)
    }
    size = _check(tokenizers)
    perceptual = dict(zip(("trunk", "heads"), args.lpips or (), strict=False))
    metrics = ("lpips",) if args.lpips else ()
    networks = judges.load_metric_networks(EvaluationConfig(), metrics, PerceptualConfig(**perceptual))
    data = command_line.data_config(args, image_size=size, eval_batch_size=args.batch)
    batches = pipeline.evaluation_batches(data, limit=args.limit)
    result = frontier.measure(tokenizers, batches, networks, args.frontier)
    for point in result["points"]:
        print(", ".join(f"{n} {value:,.5g}" if n != "name" else value for n, value in point.items()))
    if skipped := result["protocol"]["images_unreadable"]:
        print(f"skipped {skipped} images that cannot be read")
    if output:
        result["protocol"]["checkpoints"] = dict(zip(tokenizers, args.checkpoint, strict=True))
        storage.write_bytes(output / "frontier.json", (json.dumps(result, indent=2) + "\n").encode())
        storage.write_bytes(output / "frontier.png", chart(result["points"]))
        print(f"wrote {output / 'frontier.json'} and {output / 'frontier.png'}")
    return result


def chart(points: Sequence[Mapping[str, Any]]) -> bytes:
    """Returns a PNG of the points of `frontier.measure`; those at the rates of tokenizers are marked."""
    points = [point for point in points if "bits_per_image" in point]
    largest = max(point["bits_per_image"] for point in points if "quality" not in point)
    names, panels, marks = dict.fromkeys(point["name"] for point in points), {}, {}
    for metric, title in TITLES.items():
        if metric in points[0]:
            panels[title], marks[title] = (
                {name: _select(points, name, metric, ("length", kind), largest) for name in names}
                for kind in ("quality", "limit")
            )
    return visualize.curves(panels, "png", UNITS, marks)


def _select(points: Sequence[Any], name: str, metric: str, kinds: Collection[str], largest: float) -> visualize.Curve:
    """Returns the points of a name; codecs up to MARGIN times the largest rate, or their own beginning."""
    own = [(x["bits_per_image"], x[metric]) for x in points if x["name"] == name and set(kinds) & set(x)]
    end = MARGIN * max([largest, *(x for x, _ in own[:1])])
    return [x for x, _ in own if x <= end], [y for x, y in own if x <= end]


def _check(tokenizers: dict[str, Tokenizer]) -> int:
    """Returns the image size; raises ConfigError for a tokenizer without codes, and for several sizes."""
    for name, tokenizer in tokenizers.items():
        if not tokenizer.has_codes:
            problem = 'is a continuous autoencoder (quantizer "none"), which has no rate'
            raise ConfigError(problem, field="--checkpoint", value=name)
    sizes = {tokenizer.image_size for tokenizer in tokenizers.values()}
    if len(sizes) > 1:
        problem = f"decode images of {' and '.join(map(str, sorted(sizes)))} pixels; compare tokenizers of one size"
        raise ConfigError(problem, field="--checkpoint", value=list(tokenizers))
    return sizes.pop()


main = command_line.build_main(parser, evaluate)

if __name__ == "__main__":
    main()
