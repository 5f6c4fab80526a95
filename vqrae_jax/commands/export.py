"""python -m vqrae_jax.commands.export --checkpoint=runs/quickstart --format=safetensors --output=exported

pytorch: a checkpoint of the PyTorch origin (.pt), and its latent statistics beside it.
safetensors: our own folder, see `folder`.
stablehlo: encode and decode as programs that run without this package, for any batch size, on CPU, GPU and TPU.
"""

import argparse
from collections.abc import Sequence

import jax

from vqrae_jax import storage
from vqrae_jax.commands import command_line as command
from vqrae_jax.errors import ConfigError
from vqrae_jax.inference import pytorch_checkpoint, stablehlo
from vqrae_jax.inference import saving as folder
from vqrae_jax.inference.tokenizer import Tokenizer
from vqrae_jax.pretrained import pytorch_vqrae, writers


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vqrae_jax.commands.export",
        description="Writes a trained model for others: the PyTorch VQRAE, a folder of our own, or StableHLO programs.",
    )
    parser.add_argument(
        "--checkpoint", required=True, help="workdir of a run, one of its checkpoints, or such a folder"
    )
    parser.add_argument("--format", required=True, choices=["pytorch", "safetensors", "stablehlo"])
    parser.add_argument("--output", required=True, help="pytorch: a .pt file; else a folder")
    parser.add_argument("--step", type=int, help="checkpoint step; the newest by default")
    parser.add_argument(
        "--transformers", type=int, choices=[4, 5], default=4,
        help="pytorch: whose names the encoder's tensors get; default: 4, as in most checkpoints and hub files",
    )  # fmt: skip
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> list[storage.Path]:
    """Runs the command; returns the files written."""
    output = storage.resolve_path(args.output)
    if args.format == "pytorch" and output.suffix not in (".pt", ".pth"):
        raise ConfigError(f"--output={output}: a PyTorch checkpoint is a .pt or .pth file")
    tokenizer = Tokenizer.load(args.checkpoint, args.step)
    if args.format == "safetensors":
        tokenizer.save_pretrained(output)
        return [output / folder.CONFIG, output / folder.WEIGHTS]
    if args.format == "stablehlo":
        with storage.stage_output(output) as place:
            written = stablehlo.write_programs(tokenizer.module, jax.device_get(tokenizer.variables), place)
        return [output / file.name for file in written]
    variables = jax.device_get(tokenizer.trained)
    states = {output: pytorch_checkpoint.build_checkpoint(tokenizer.config, variables, args.transformers)}
    if statistics := pytorch_vqrae.build_statistics(variables):
        states[output.with_name(f"{output.stem}_stat.pt")] = statistics
    for file, state in states.items():
        with storage.stage_output(file) as place:
            place.parent.mkdir(parents=True, exist_ok=True)
            writers.write_torch(state, place)
    return list(states)


def main() -> None:
    command.run(lambda: print("wrote " + ", ".join(str(path) for path in run(parse()))))


if __name__ == "__main__":
    main()
