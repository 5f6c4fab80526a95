"""Images per CPU second of the training input, against a PyTorch DataLoader with PIL; see `main`."""

import argparse
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from vqrae_jax.config import DataConfig
from vqrae_jax.data import images, photographs
from vqrae_jax.data.pipeline import train_batches
from vqrae_jax.models.encoder import IMAGENET_MEAN, IMAGENET_STD

MEAN, STD = np.float32(IMAGENET_MEAN), np.float32(IMAGENET_STD)


def main(arguments: list[str]) -> None:
    """Prints images per CPU second of both, timed in turns, and the memory of three epochs."""
    parser = argparse.ArgumentParser(prog="python -m vqrae_jax.benchmark input", description=__doc__)
    parser.add_argument(
        "--torch-python", default=sys.executable, help="a Python (3.11 or newer) with torch, numpy and Pillow"
    )
    parser.add_argument("--images", help="a flat folder of JPEGs; default: 500 x 375 crops of the shipped photographs")
    parser.add_argument("--size", type=int, default=256, help="pixels of a training image")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="how often each is timed; the best counts")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.images or write_photographs(pathlib.Path(scratch))
        count = len(os.listdir(folder))
        print(f"{count} JPEGs to {given.size} x {given.size}, batches of {given.batch}; images per CPU second:")
        best = dict.fromkeys(("PyTorch, one worker", "uint8 batches", "normalized float32"), 0.0)
        for _ in range(given.rounds):
            speeds = _torch(given, folder), _ours(given, folder, count, False), _ours(given, folder, count, True)
            best = {name: max(before, now) for (name, before), now in zip(best.items(), speeds, strict=True)}
        torch = best["PyTorch, one worker"]
        for name, speed in best.items():
            ratio = f", {speed / torch:.2f} times PyTorch" if torch and speed != torch else ""
            print(f"  {name}: {speed:.0f}{ratio}")
        _memory(given, folder, count)


def write_photographs(folder: pathlib.Path, count: int = 1024) -> str:
    """ImageNet's usual size and quality, 500 x 375, so that there is something to decode and to resize.

    Many: of fewer than thousands, grain's shuffle draws hundreds of numbers to find one in range.
    """
    rng, shipped = np.random.default_rng(0), photographs.load_photographs("train")
    for i in range(count):
        square = images.random_crop(shipped[i % len(shipped)], 500, rng, scale=(0.5, 1.5))
        images.write_image(folder / f"{i:04d}.jpg", square[:375])
    return str(folder)


def _config(given: argparse.Namespace, folder: str) -> DataConfig:
    return DataConfig(source="folder", path=folder, image_size=given.size, batch_size=given.batch)


def _ours(given: argparse.Namespace, folder: str, count: int, normalized: bool) -> float:
    """Images per CPU second of all threads of this process."""
    normalize = jax.jit(lambda x: (x.astype(jnp.float32) / 255 - MEAN) / STD)
    batches = train_batches(_config(given, folder), seed=0)

    def run(steps: int) -> None:
        for _ in range(steps):
            image = next(batches)["image"]
            if normalized:
                normalize(image).block_until_ready()

    run(count // given.batch)  # compilation, full buffers
    steps, start = 3 * count // given.batch, time.process_time()
    run(steps)
    speed = steps * given.batch / (time.process_time() - start)
    batches.close()
    return speed


def _torch(given: argparse.Namespace, folder: str) -> float:
    """Images per CPU second of a DataLoader with one worker; 0 where that Python has no torch or no Pillow."""
    program = pathlib.Path(__file__).with_name("torch_input.py")
    # -P: beside it are modules with the names of Python's own
    command = [given.torch_python, "-P", program, folder, str(given.size), str(given.batch), "1", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"  PyTorch is left out: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
        return 0.0
    return float(done.stdout)


def _memory(given: argparse.Namespace, folder: str, count: int) -> None:
    batches = train_batches(_config(given, folder), seed=0)
    peaks = []
    for _ in range(3):
        for _ in range(count // given.batch):
            next(batches)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
    batches.close()
    print(f"  peak resident memory after epochs 1, 2, 3: {', '.join(f'{peak:.0f}' for peak in peaks)} MiB")
