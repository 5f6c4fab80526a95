"""`python -m vqrae_jax.benchmark NAME [arguments]`: measured speeds and sizes."""

import importlib
import sys
import textwrap

from vqrae_jax import runtime

STAGES = "timed beside this machine's ceilings, with --against=pytorch beside PyTorch"
BENCHMARKS = {  # name -> module and what it measures
    "encoder": ("speed", f"DINOv2 at 224 pixels, {STAGES}"),
    "decoder": ("speed", f"the ViT decoder, {STAGES}"),
    "codes": ("speed", f"tokenizing: encoder and search, {STAGES}"),
    "quantizer": ("speed", f"the EMA quantizer's training step, {STAGES}"),
    "train_step": ("speed", f"the whole training step, {STAGES}; several stages can be named"),
    "end_to_end": ("end_to_end", "the training loop with input, logging and checkpoints, against its bare step"),
    "quantizers": (
        "quantizers",
        "search and training step of the quantizers, and a table of all of them at equal bits",
    ),
    "input": ("input", "images per second and core of the training input, against a PyTorch DataLoader"),
    "low_precision": ("low_precision", "codes and pictures of an encoder that multiplies in int8 and fp8"),
    "kernels": ("kernels", "ways to search, to add up latents by code and to attend, beside each other"),
    "gpu": ("gpu", "all of these that want a GPU, in three commands of less than ten minutes"),
    "tokenize": ("tokenize", "tokenizing a folder from disk to disk, against the bare encoder and search"),
}


def usage() -> str:
    """What there is, in lines of a terminal."""
    told = (
        textwrap.fill(f"{name}: {what}", 80, initial_indent="  ", subsequent_indent="    ")
        for name, (_, what) in BENCHMARKS.items()
    )
    return "\n".join(["usage: python -m vqrae_jax.benchmark NAME [arguments], or NAME --help", *told])


def main(arguments: list[str]) -> None:
    """Runs the benchmark named first.

    Raises:
      SystemExit: help was asked for, or no such benchmark.
    """
    if arguments[:1] in (["-h"], ["--help"]):
        print(usage())
        raise SystemExit(0)
    if not arguments or arguments[0] not in BENCHMARKS:
        raise SystemExit(usage())
    runtime.keep_freed_memory()
    runtime.skip_absent_tpu()
    module, _ = BENCHMARKS[arguments[0]]
    rest = arguments if module == "speed" else arguments[1:]
    importlib.import_module(f"vqrae_jax.benchmark.{module}").main(rest)


if __name__ == "__main__":
    main(sys.argv[1:])
