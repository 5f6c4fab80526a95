"""Images per second and core of the training input, against a PyTorch DataLoader with PIL; see `main`."""

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

MEAN, STD = np.float32((0.485, 0.456, 0.406)), np.float32((0.229, 0.224, 0.225))


def main(arguments: list[str]) -> None:
    """Prints images per second of both, in turns on the same single core, and the memory of three epochs."""
    parser = argparse.ArgumentParser(prog="python -m vqrae_jax.benchmark input", description=__doc__)
    parser.add_argument("--torch-python", default=sys.executable, help="a Python with torch, numpy and Pillow")
    parser.add_argument("--images", help="a flat folder of JPEGs; default: 500 x 375 crops of the shipped photographs")
    parser.add_argument("--size", type=int, default=256, help="pixels of a training image")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="how often each is timed; the best counts")
    given = parser.parse_args(arguments)
    if hasattr(os, "sched_setaffinity"):  # inherited by threads and processes started from here
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.images or _write_photographs(pathlib.Path(scratch))
        count = len(os.listdir(folder))
        print(f"{count} JPEGs to {given.size} x {given.size}, batches of {given.batch}, one core")
        best = {"torch": 0.0, "ours": 0.0, "ours, worker": 0.0}
        for _ in range(given.rounds):
            best["torch"] = max(best["torch"], _torch(given, folder))
            best["ours"] = max(best["ours"], _ours(given, folder, count, workers=0))
            best["ours, worker"] = max(best["ours, worker"], _ours(given, folder, count, workers=1))
        for name, speed in best.items():
            ratio = f", {speed / best['torch']:.2f} times torch" if best["torch"] and name != "torch" else ""
            print(f"  {name}: {speed:.0f} images/s{ratio}")
        if not best["torch"]:
            print("  no torch with Pillow there: give --torch-python for the comparison")
        _memory(given, folder, count)


def _write_photographs(folder: pathlib.Path, count: int = 256) -> str:
    """ImageNet's usual size and quality, 500 x 375, so that there is something to decode and to resize."""
    rng, shipped = np.random.default_rng(0), photographs.load("train")
    for i in range(count):
        square = images.random_crop(shipped[i % len(shipped)], 500, rng, scale=(0.5, 1.5))
        images.write_image(folder / f"{i:04d}.jpg", square[:375])
    return str(folder)


def _config(given: argparse.Namespace, folder: str, workers: int) -> DataConfig:
    return DataConfig(
        source="folder", path=folder, image_size=given.size, batch_size=given.batch, workers=workers, threads=2
    )


def _ours(given: argparse.Namespace, folder: str, count: int, workers: int) -> float:
    """The pipeline and the normalization, as float32 arrays of JAX on the CPU."""
    normalize = jax.jit(lambda x: (x.astype(jnp.float32) / 255 - MEAN) / STD)
    batches = train_batches(_config(given, folder, workers), seed=0)
    for _ in range(4):  # compilation, worker start, full buffers
        normalize(next(batches)["image"]).block_until_ready()
    steps, start = 2 * count // given.batch, time.perf_counter()
    for _ in range(steps):
        normalize(next(batches)["image"]).block_until_ready()
    speed = steps * given.batch / (time.perf_counter() - start)
    batches.close()
    return speed


def _torch(given: argparse.Namespace, folder: str) -> float:
    """Images per second of one DataLoader worker; 0 where that Python has no torch or no Pillow."""
    program = pathlib.Path(__file__).with_name("torch_input.py")
    command = [given.torch_python, program, folder, str(given.size), str(given.batch), "1", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(done.stdout) if done.returncode == 0 else 0.0


def _memory(given: argparse.Namespace, folder: str, count: int) -> None:
    batches = train_batches(_config(given, folder, workers=0), seed=0)
    peaks = []
    for _ in range(3):
        for _ in range(count // given.batch):
            next(batches)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
    batches.close()
    print(f"  peak resident memory after epochs 1, 2, 3: {', '.join(f'{peak:.0f}' for peak in peaks)} MiB")
