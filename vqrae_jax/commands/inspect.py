"""Shows what a checkpoint is: model, sizes, metrics, config and origin.

vqrae inspect --checkpoint=runs/quickstart

Everything is read from descriptions and shapes: weights are loaded for --hash only, and nothing is compiled.
"""

import argparse
import collections
import json
import math
import sys
from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict

from vqrae_jax.build import generator as generators
from vqrae_jax.build.encoder import weights_source
from vqrae_jax.build.tokenizer import build_tokenizer, variable_shapes
from vqrae_jax.commands import command_line
from vqrae_jax.errors import ConfigError, WeightsError
from vqrae_jax.inference.generator_location import GeneratorLocation, locate_generator
from vqrae_jax.inference.location import Location, holds_generator, locate, stored_shapes
from vqrae_jax.inference.tokenizer import Tokenizer

WIDTH = 160  # columns of output that is not a terminal

parser = command_line.Parser("inspect", "Shows the config, sizes, metrics and origin of a checkpoint.")
parser.add_checkpoint()
parser.add("--config", "show every field of the config, not only changed ones", action="store_true")
parser.add("--hash", "show the hash of the tokenizer too; reads all weights", action="store_true")
parser.add_encoder_dtype()
parser.add("--json", "print one JSON object instead of a table", action="store_true")


def inspect(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the command; returns what it shows."""
    if holds_generator(args.checkpoint, args.step):
        location = locate_generator(args.checkpoint, args.step)
    else:
        location = locate(args.checkpoint, args.step, args.encoder)
    config, provenance = location.run or location.config, dict(location.provenance)
    metrics, protocol = provenance.pop("metrics", {}), provenance.pop("protocol", {})
    values = config.model_dump(mode="json")
    description = {
        "path": str(location.path),
        "kind": "exported folder" if location.run is None else "checkpoint",
        **_describe_model(location),
        "bytes": sum(file.stat().st_size for file in location.path.rglob("*") if file.is_file()),
        "provenance": provenance,
        "metrics": metrics,
        "config": values if args.config else _changes(values, type(config)().model_dump(mode="json")),
        "protocol": protocol,
    }
    if args.hash and isinstance(location, Location):
        description["hash"] = Tokenizer.load(
            args.checkpoint, args.step, encoder=args.encoder, encoder_dtype=args.encoder_dtype
        ).hash
    if args.json:
        print(json.dumps(description, indent=1, ensure_ascii=False))
    else:
        _print_table(description)
    return description


def _describe_model(location: Location | GeneratorLocation) -> dict[str, Any]:
    if isinstance(location, Location):
        return _describe_tokenizer(location)
    config = location.config
    names = ("family", "grids", "levels", "num_embeddings", "classes", "width", "depth", "heads")
    shapes = generators.variable_shapes(generators.build_generator(config))
    parameters = {part: _size(tree) for part, tree in shapes["params"]["generator"].items() if isinstance(tree, dict)}
    parameters["total"] = _size(shapes["params"])
    tokenizer = {"path": config.tokenizer, "hash": config.tokenizer_hash}
    return {"model": {n: getattr(config, n) for n in names}, "parameters": parameters, "tokenizer": tokenizer}


def _describe_tokenizer(location: Location) -> dict[str, Any]:
    """Returns the code grid and the parameters of each part; less if the encoder's description is not available."""
    # Files of statistics and initial weights, which may be gone, decide none of these shapes.
    config = location.config.model_copy(update={"normalization_stat_path": None, "pretrained_decoder_path": None})
    try:
        built = build_tokenizer(config, weights=False)
    except (ConfigError, WeightsError) as error:
        return {"parameters": _stored_sizes(location), "encoder": str(error)}
    shapes = variable_shapes(built)
    parameters = {part: _size(tree) for part, tree in shapes["params"].items()}
    parameters |= {f"{part} (state)": _size(tree) for part, tree in shapes["batch_stats"].items()}
    tokenizer = Tokenizer(built.module, shapes, location.config)
    model = {"image size": tokenizer.image_size}
    if tokenizer.grid:
        model |= {"grid": tokenizer.grid, "downsampling": tokenizer.downsampling}
    if tokenizer.has_codes:
        model |= {"code shape": list(tokenizer.code_shape), "codebook size": tokenizer.codebook_size}
        model["bits per image"] = tokenizer.bits_per_image
    encoder = weights_source(location.config)[0] if location.frozen else "in the files"
    return {"model": model, "parameters": parameters, "encoder": encoder}


def _stored_sizes(location: Location) -> dict[str, int]:
    """Returns the number of stored values by part, for example "params/decoder"."""
    sizes = collections.Counter()
    for name, leaf in stored_shapes(location).items():
        sizes["/".join(name.split("/")[:2])] += math.prod(leaf.shape)
    return dict(sizes)


def _size(tree: Mapping[str, Any]) -> int:
    return sum(math.prod(leaf.shape) for leaf in flatten_dict(tree).values())


def _changes(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    changes = {}
    for name, value in values.items():
        default = defaults.get(name)
        if isinstance(value, dict) and isinstance(default, dict) and default:
            value, default = _changes(value, default), {}
        if value != default:
            changes[name] = value
    return changes


def _print_table(description: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    protocol = {name: value for name, value in description["protocol"].items() if name != "model"}  # it is in "config"
    for name, value in flatten_dict(description | {"protocol": protocol}, sep=".").items():
        text = f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
        table.add_row(name, text)
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table, highlight=False, markup=False)


main = command_line.build_main(parser, inspect)

if __name__ == "__main__":
    main()
