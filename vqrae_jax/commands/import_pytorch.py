"""Converts a checkpoint of the PyTorch RAE or VQRAE to a folder for `Tokenizer.load`.

vqrae import-pytorch --checkpoint=ep-last.pt --config=configs/vqrae_dinov2_b.py --output=imported
"""

import argparse
import pathlib

from vqrae_jax import config as config_lib
from vqrae_jax import storage
from vqrae_jax.commands import command_line
from vqrae_jax.errors import ConfigError
from vqrae_jax.inference import pytorch_checkpoint, saving
from vqrae_jax.pretrained import readers, sources

parser = command_line.Parser("import-pytorch", "Converts a checkpoint of the PyTorch RAE or VQRAE to a folder.")
parser.add("--checkpoint", "local file, or owner/name/path/to/file on the hub", required=True)
parser.add("--config", "config of the model: configs/NAME.py[:argument], or .json", required=True)
parser.add("--weights", "which weights of a training checkpoint", choices=["ema", "model"], default="ema")
parser.add("--output", "folder to write", required=True)


def import_pytorch(args: argparse.Namespace) -> storage.Path:
    """Runs the command; returns the folder written, which holds the encoder of the checkpoint too."""
    output, config = command_line.output_folder(args.output), read_config(args.config)
    tensors = sources.read_state_dict(args.checkpoint, "--checkpoint")
    _, variables = pytorch_checkpoint.convert_checkpoint(config, tensors, args.weights, args.checkpoint)
    with storage.stage_output(output) as folder:
        saving.save_folder(folder, config, variables, frozen=False)
    print(f"wrote {output}")
    return output


def read_config(name: str) -> config_lib.ModelConfig:
    """Reads the model section of a Python file as in configs/, with an optional argument after a colon, or of JSON."""
    file = pathlib.Path(name.partition(":")[0])
    if not file.is_file() or file.suffix not in (".py", ".json"):
        raise ConfigError("expected an existing .py or .json file", field="--config", value=name)
    is_json = file.suffix == ".json"
    values = readers.read_json(file, "--config") if is_json else config_lib.load_config_file(name).to_dict()
    return config_lib.from_dict(config_lib.Config, values).model


main = command_line.build_main(parser, import_pytorch)

if __name__ == "__main__":
    main()
