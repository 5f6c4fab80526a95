"""Measures images per CPU second of the training input and of a PyTorch DataLoader.

python benchmarks/training_input.py
"""

import argparse
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # the checkout

import jax
import jax.numpy as jnp
import numpy as np

from vqrae_jax.benchmark.machine import format_machine
from vqrae_jax.commands import command_line
from vqrae_jax.commands.command_line import count
from vqrae_jax.config import DataConfig
from vqrae_jax.data import images, photographs
from vqrae_jax.data.pipeline import train_batches
from vqrae_jax.models.encoder import IMAGENET_MEAN, IMAGENET_STD

MEAN, STD = np.float32(IMAGENET_MEAN), np.float32(IMAGENET_STD)


def main(arguments: list[str]) -> None:
    """Prints images per CPU second of both, timed in turns, and the peak memory after each of three epochs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--torch-python", default=sys.executable, help="Python interpreter with torch, numpy and Pillow"
    )
    parser.add_argument("--images", help="folder of JPEG files; default: 500 x 375 crops of the shipped photographs")
    parser.add_argument("--size", type=count, default=256, help="pixels of a training image")
    parser.add_argument("--batch", type=count, default=64, help="images per batch")
    parser.add_argument("--rounds", type=count, default=3, help="number of measurements, of which the best counts")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.images or write_photographs(pathlib.Path(scratch))
        number = len(os.listdir(folder))
        print(format_machine())
        print(f"{number} JPEG files to {args.size} x {args.size}, batches of {args.batch}; images per CPU second:")
        best = dict.fromkeys(("PyTorch, one worker", "uint8 batches", "normalized float32"), 0.0)
        for _ in range(args.rounds):
            versions, torch_speed = measure_pytorch(args, folder)
            speeds = (torch_speed, *(measure_input(args, folder, number, normalized) for normalized in (False, True)))
            best = {name: max(before, now) for (name, before), now in zip(best.items(), speeds, strict=True)}
        pytorch = best["PyTorch, one worker"]
        for name, speed in best.items():
            ratio = f", {speed / pytorch:.2f} times PyTorch ({versions})" if pytorch and speed != pytorch else ""
            print(f"  {name}: {speed:.0f}{ratio}")
        print_memory(args, folder, number)


def write_photographs(folder: pathlib.Path, count: int = 1024) -> str:
    """Writes 500 x 375 JPEG files, the usual size in ImageNet, so that there is something to decode and resize.

    The default is large because grain's shuffle of fewer than thousands of images is slow.
    """
    rng, shipped = np.random.default_rng(0), photographs.load_photographs("train")
    for i in range(count):
        square = images.random_crop(shipped[i % len(shipped)], 500, rng, scale=(0.5, 1.5))
        images.write_image(folder / f"{i:04d}.jpg", square[:375])
    return str(folder)


def measure_input(args: argparse.Namespace, folder: str, count: int, normalized: bool) -> float:
    """Returns images per CPU second of all threads of this process."""
    normalize = jax.jit(lambda x: (x.astype(jnp.float32) / 255 - MEAN) / STD)
    batches = train_batches(_data_config(args, folder), seed=0)

    def run(steps: int) -> None:
        for _ in range(steps):
            image = next(batches)["image"]
            if normalized:
                normalize(image).block_until_ready()

    run(count // args.batch)  # compiles, and fills the buffers
    steps, start = 3 * count // args.batch, time.process_time()
    run(steps)
    speed = steps * args.batch / (time.process_time() - start)
    batches.close()
    return speed


def measure_pytorch(args: argparse.Namespace, folder: str) -> tuple[str, float]:
    """Returns versions, and images per CPU second of a DataLoader with one worker; 0 without torch or Pillow."""
    program = pathlib.Path(__file__).with_name("torch_input.py")
    command = [args.torch_python, "-P", program, folder, str(args.size), str(args.batch), "1", "3"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        print(f"  without PyTorch: {(process.stderr.strip().splitlines() or ['it gives no reason'])[-1]}")
        return "", 0.0
    speed, versions = process.stdout.splitlines()
    return versions, float(speed)


def print_memory(args: argparse.Namespace, folder: str, count: int) -> None:
    """Prints the peak of the resident memory after each of three epochs."""
    batches = train_batches(_data_config(args, folder), seed=0)
    peaks = []
    for _ in range(3):
        for _ in range(count // args.batch):
            next(batches)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
    batches.close()
    print(f"  peak resident memory after epochs 1, 2, 3: {', '.join(f'{peak:.0f}' for peak in peaks)} MiB")


def _data_config(args: argparse.Namespace, folder: str) -> DataConfig:
    return DataConfig(source="folder", path=folder, image_size=args.size, batch_size=args.batch)


if __name__ == "__main__":
    command_line.run(lambda: main(sys.argv[1:]))
