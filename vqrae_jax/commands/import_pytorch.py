"""Converts a checkpoint of the PyTorch RAE or VQRAE to a folder for `Tokenizer.load`.

vqrae import-pytorch --checkpoint=ep-last.pt --config=VQRAE-DINOv2-B.yaml --output=imported

The config is the YAML file of the PyTorch program. If it has a section `training`, the folder also has train.py, a
config of ours that trains as the file says. A released decoder becomes a continuous autoencoder with the encoder and
the latent statistics that the config names; without --checkpoint the config names the decoder as well.
"""

import argparse
import pathlib
from typing import Any

import numpy as np

from vqrae_jax import config as config_lib
from vqrae_jax import storage
from vqrae_jax.build.tokenizer import BuiltTokenizer
from vqrae_jax.commands import command_line
from vqrae_jax.config import ModelConfig, pytorch_yaml
from vqrae_jax.errors import ConfigError, UserError
from vqrae_jax.inference import pytorch_checkpoint, saving
from vqrae_jax.pretrained import readers, sources

parser = command_line.Parser("import-pytorch", "Converts a checkpoint of the PyTorch RAE or VQRAE to a folder.")
CHECKPOINT = "local file, or owner/name/path/to/file on the hub; a folder of diffusers; by default the config's decoder"
parser.add("--checkpoint", CHECKPOINT)
parser.add(
    "--config",
    "the PyTorch program's .yaml, or a config of ours: configs/NAME.py[:argument] or .json; not for diffusers",
)
parser.add("--weights", "which weights of a training checkpoint", choices=["ema", "model"], default="ema")
parser.add("--output", "folder to write", required=True)

TITLE = "Trains as a config of the PyTorch VQRAE says; `vqrae import-pytorch` wrote this file from it."


def import_pytorch(args: argparse.Namespace) -> storage.Path:
    """Runs the command; returns the folder written, which holds the encoder of the checkpoint too."""
    output = command_line.output_folder(args.output)
    if args.config is None and args.checkpoint is not None:
        return _import_folder(args.checkpoint, output)
    if args.config is None:
        raise ConfigError("name a checkpoint, a config with a decoder, or both", field="--checkpoint", value=None)
    source = read_config(args.config)
    model, notes = source.config.model, [*source.notes]
    tensors = sources.read_state_dict(args.checkpoint, "--checkpoint") if args.checkpoint else None
    try:
        if decoder_only := tensors is None or pytorch_checkpoint.is_decoder(tensors):
            if args.weights == "model" and "ema" in (tensors or {}):
                message = "is for whole models; of a decoder alone the 'ema' weights are read, which this file has"
                raise ConfigError(message, field="--weights", value=args.weights)
            model, built, variables = _combine(model, args.checkpoint)
            notes.append(f"{model.pretrained_decoder_path} has no codebook; `vqrae fit-codebook` or training adds one")
        else:
            built, variables = pytorch_checkpoint.convert_checkpoint(model, tensors, args.weights, args.checkpoint)
    except UserError as error:
        raise pytorch_yaml.name_key(error, source.keys) from error.__cause__
    if "var" in (latent := variables["batch_stats"].get("latent", {})):
        variance = latent["var"] + np.float32(source.stat_eps - pytorch_yaml.STAT_EPS)
        variables["batch_stats"]["latent"] = latent | {"var": variance}
    with storage.stage_output(output) as folder:
        saving.save_folder(folder, model, variables, frozen=decoder_only)
        if source.trains:
            data = source.config.data.model_copy(update={"image_size": built.image_size})
            start = {"pretrained_decoder_path": model.pretrained_decoder_path}
            trained = source.config.model.model_copy(update=start) if decoder_only else model
            config = source.config.model_copy(update={"data": data, "model": trained})
            (folder / "train.py").write_text(pytorch_yaml.to_python(config, TITLE, source.notes))
    print(*notes, f"wrote {output}", sep="\n")
    return output


def _combine(model: ModelConfig, decoder: str | None) -> tuple[ModelConfig, BuiltTokenizer, dict[str, Any]]:
    """Makes a continuous autoencoder of a decoder, by default that of the config, and what the config names."""
    if (path := decoder or model.pretrained_decoder_path) is None:
        problem = "name a file, or a config with model.pretrained_decoder_path"
        raise ConfigError(problem, field="--checkpoint", value=None)
    return pytorch_checkpoint.combine_pretrained(model.model_copy(update={"pretrained_decoder_path": path}))


def _import_folder(path: str, output: storage.Path) -> storage.Path:
    """Converts a folder or hub id of diffusers' AutoencoderRAE, which describes itself."""
    folder = sources.fetch_weights(path, "--checkpoint")
    if not (folder.is_dir() and saving.is_saved_folder(folder)):
        message = "must be the PyTorch program's .yaml or a config of ours; only AutoencoderRAE folders need none"
        raise ConfigError(message, field="--config", value=None)
    config, _, provenance = saving.read_description(folder)
    _, variables = saving.load_folder(folder, config)
    with storage.stage_output(output) as staged:
        saving.save_folder(staged, config, variables, frozen=False, provenance=provenance)
    print(f"wrote {output}")
    return output


def read_config(name: str) -> pytorch_yaml.PyTorchConfig:
    """Reads a YAML file of the PyTorch programs, a Python file as in configs/ (NAME.py[:argument]), or JSON."""
    file = pathlib.Path(name)
    if file.is_file() and file.suffix in (".yaml", ".yml"):
        return pytorch_yaml.read_pytorch_yaml(file, "--config")
    file = pathlib.Path(name.partition(":")[0])
    if not file.is_file() or file.suffix not in (".py", ".json"):
        raise ConfigError("expected an existing .yaml, .py or .json file", field="--config", value=name)
    is_json = file.suffix == ".json"
    values = readers.read_json(file, "--config") if is_json else config_lib.load_config_file(name).to_dict()
    return pytorch_yaml.PyTorchConfig(config_lib.from_dict(config_lib.Config, values))


main = command_line.build_main(parser, import_pytorch)

if __name__ == "__main__":
    main()
