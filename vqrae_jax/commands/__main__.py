"""Dispatches `vqrae COMMAND [arguments]` to the module of the command."""

import difflib
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "codebook": "report how a tokenizer uses its codebook on a set of images",
    "demo": "serve a web page to edit the codes of images, and to sample from a generator",
    "detokenize": "decode a dataset or an array of codes to image files",
    "evaluate": "measure reconstructions, at all rates of a tokenizer and next to JPEG and WebP",
    "export": "write a model for PyTorch, as a folder, or as StableHLO programs",
    "fit-codebook": "fit a codebook to the latents of a continuous autoencoder",
    "generate": "sample images of classes from a generator: files, a grid, an .npz for evaluation",
    "import-pytorch": "convert a checkpoint of the PyTorch VQRAE",
    "inspect": "show the config, sizes, metrics and origin of a checkpoint",
    "latent-statistics": "compute mean, variance and principal axes of an encoder's latents",
    "plot": "plot the training curves of runs",
    "reconstruct": "encode and decode images, and show both next to their codes",
    "reference-statistics": "compute the reference of a Frechet distance from images",
    "tokenize": "encode a dataset of images to shards of codes",
}
USAGE = "usage: vqrae COMMAND [arguments]; vqrae COMMAND --help describes the arguments of a command"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command that the first argument names."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE, "", *(f"  {command:<22}{text}" for command, text in COMMANDS.items()), sep="\n")
    elif name in COMMANDS:
        importlib.import_module(f"vqrae_jax.commands.{name.replace('-', '_')}").main(rest)
    else:
        nearest = difflib.get_close_matches(name, COMMANDS, 1, 0)[0]
        print(f"error: unknown command {name!r}: did you mean {nearest!r}? vqrae --help lists all", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
