"""A tokenizer whose encoder multiplies in int8 and fp8: how many codes stay the same, and what the pictures lose."""

import argparse
import time

import numpy as np

from vqrae_jax.data import folder, images
from vqrae_jax.evaluation.psnr import psnr
from vqrae_jax.inference.tokenizer import Tokenizer

KINDS = ("dtype", "int8", "fp8")


def main(arguments: list[str]) -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m vqrae_jax.benchmark low_precision", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="as of inference.tokenize")
    parser.add_argument("--data", required=True, help="folder of images")
    parser.add_argument("--limit", type=int, default=100, help="the first so many images only")
    given = parser.parse_args(arguments)
    files = folder.list_images(given.data, field="--data")[: given.limit]
    print("| encoder's products | same codes | PSNR, dB | images per second |")
    print("| --- | --- | --- | --- |")
    exact = pictures = None
    for kind in KINDS:
        tokenizer = Tokenizer.load(given.checkpoint, encoder_matmul=kind)
        if pictures is None:
            pictures = np.stack([images.center_crop(images.read_image(file), tokenizer.image_size) for file in files])
        tokenizer.encode_to_indices(pictures)  # compiles
        start = time.perf_counter()
        codes = tokenizer.encode_to_indices(pictures)
        seconds = time.perf_counter() - start
        exact = codes if exact is None else exact
        painted = tokenizer.decode_from_indices(codes)
        name = tokenizer.config.dtype if kind == "dtype" else kind
        print(
            f"| {name} | {np.mean(codes == exact):.2%} | {np.mean(psnr(painted, pictures / 255)):.3f} | "
            f"{len(files) / seconds:.1f} |"
        )
