"""Writes a trained model in a format for other programs.

vqrae export --checkpoint=runs/quickstart --format=safetensors --output=exported

pytorch: a checkpoint of the PyTorch VQRAE (.pt), and its latent statistics next to it.
safetensors: config.json and model.safetensors, for `Tokenizer.load`.
stablehlo: encode and decode as programs that run without this package, for any batch size, on CPU, GPU and TPU.
"""

import argparse

import jax

from vqrae_jax import storage
from vqrae_jax.commands import command_line
from vqrae_jax.inference import pytorch_checkpoint, saving, stablehlo
from vqrae_jax.inference.tokenizer import Tokenizer
from vqrae_jax.pretrained import pytorch_vqrae, writers

parser = command_line.Parser("export", "Writes a trained model for PyTorch, as a folder, or as StableHLO.")
parser.add_checkpoint()
parser.add("--format", required=True, choices=["pytorch", "safetensors", "stablehlo"])
parser.add("--output", "a .pt file for pytorch, otherwise a folder", required=True)
parser.add("--embed-encoder", "safetensors: write the frozen encoder's weights as well", action="store_true")
parser.add("--transformers", "pytorch: version whose names the encoder gets", type=int, choices=[4, 5], default=4)


def export(args: argparse.Namespace) -> list[storage.Path]:
    """Runs the command; returns the files written."""
    if args.format == "pytorch":
        output = command_line.output_file(args.output, (".pt", ".pth"))
    else:
        output = command_line.output_folder(args.output)
    tokenizer = Tokenizer.load(args.checkpoint, args.step, encoder=args.encoder)
    if args.format == "safetensors":
        tokenizer.save_pretrained(output, embed_encoder=args.embed_encoder)
        written = [output / saving.CONFIG, output / saving.WEIGHTS]
    elif args.format == "stablehlo":
        with storage.stage_output(output) as folder:
            files = stablehlo.write_programs(tokenizer.module, jax.device_get(tokenizer.variables), folder)
        written = [output / file.name for file in files]
    else:
        variables = jax.device_get(tokenizer.trained)
        states = {output: pytorch_checkpoint.build_checkpoint(tokenizer.config, variables, args.transformers)}
        if statistics := pytorch_vqrae.build_statistics(variables, tokenizer.config.reshape_to_2d):
            states[output.with_name(f"{output.stem}_stat.pt")] = statistics
        for path, state in states.items():
            with storage.stage_output(path) as file:
                file.parent.mkdir(parents=True, exist_ok=True)
                writers.write_torch(state, file)
        written = list(states)
    print("wrote " + ", ".join(map(str, written)))
    return written


main = command_line.build_main(parser, export)

if __name__ == "__main__":
    main()
