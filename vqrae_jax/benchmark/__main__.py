"""`python -m vqrae_jax.benchmark NAME [arguments]`: measured speeds and sizes."""

import importlib
import sys

BENCHMARKS = {
    "input": "images per second and core of the training input, against a PyTorch DataLoader",
    "quantizers": "search and training step of the quantizers, against bare matmuls and PyTorch",
    "tokenize": "tokenizing a folder from disk to disk, against the bare encoder and search",
}


def main(arguments: list[str]) -> None:
    """Runs the benchmark named first.

    Raises:
      SystemExit: no such benchmark.
    """
    if not arguments or arguments[0] not in BENCHMARKS:
        known = "\n".join(f"  {name}: {what}" for name, what in BENCHMARKS.items())
        raise SystemExit(f"usage: python -m vqrae_jax.benchmark NAME [arguments]\n{known}")
    importlib.import_module(f"vqrae_jax.benchmark.{arguments[0]}").main(arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
