"""python -m vqrae_jax.commands.inspect --checkpoint=runs/quickstart

What is in a checkpoint, read off its descriptions: no weights are loaded (but for --hash) and nothing is compiled.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from flax.traverse_util import flatten_dict

from vqrae_jax import checkpoint
from vqrae_jax.build.tokenizer import build_tokenizer, variable_shapes
from vqrae_jax.commands import command_line as command
from vqrae_jax.config import ModelConfig
from vqrae_jax.errors import ConfigError, WeightsError
from vqrae_jax.inference import saving as exported
from vqrae_jax.inference.location import Location, locate
from vqrae_jax.inference.tokenizer import Tokenizer

WIDTH = 160  # columns where the output is no terminal


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vqrae_jax.commands.inspect",
        description="What is in a checkpoint: config, sizes, figures, and where it comes from.",
    )
    parser.add_argument("--checkpoint", required=True, help=command.CHECKPOINT)
    parser.add_argument("--step", type=int, help="checkpoint step; the newest by default")
    parser.add_argument("--config", action="store_true", help="every field of the config, not only what was changed")
    parser.add_argument("--hash", action="store_true", help="the hash of the codes too; reads all weights")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    return parser.parse_args(argv)


def inspect(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the command; returns what it shows."""
    found = locate(args.checkpoint, args.step)
    config = found.run or found.config
    values = config.model_dump(mode="json")
    defaults = type(config)().model_dump(mode="json")
    told = {
        "path": str(found.path),
        "kind": "exported folder" if found.run is None else "checkpoint",
        **_model(found),
        "bytes": sum(file.stat().st_size for file in found.path.rglob("*") if file.is_file()),
        "provenance": {k: v for k, v in found.provenance.items() if k not in ("figures", "protocol")},
        "figures": found.provenance.get("figures", {}),
        "config": values if args.config else _changed(values, defaults),
        "protocol": found.provenance.get("protocol", {}),
    }
    if args.hash:
        told["hash"] = Tokenizer.load(args.checkpoint, args.step).hash
    if args.json:
        print(json.dumps(told, indent=1, ensure_ascii=False))
    else:
        _show(told)
    return told


def _model(found: Location) -> dict[str, Any]:
    """Parameters of each part, and what a picture becomes; less where the encoder's description cannot be had."""
    parameters = _stored(found)
    try:
        built = build_tokenizer(_without_files(found.config), weights=False)
    except (ConfigError, WeightsError) as error:
        return {"parameters": parameters, "encoder": str(error)}
    shapes = variable_shapes(built)
    parameters = {part: _count(tree) for part, tree in shapes["params"].items()} | {
        f"{part} (state)": _count(tree) for part, tree in shapes["batch_stats"].items()
    }
    tokenizer = Tokenizer(built.module, shapes, found.config)
    model = {"image size": tokenizer.image_size, "grid": tokenizer.grid, "downsampling": tokenizer.downsampling}
    if tokenizer.has_codes:
        model |= {
            "code shape": list(tokenizer.code_shape), "codebook size": tokenizer.codebook_size,
            "bits per image": tokenizer.bits_per_image,
        }  # fmt: skip
    where = found.config.encoder_config_path if found.frozen else "in the files"
    return {"model": model, "parameters": parameters, "encoder": where}


def _without_files(config: ModelConfig) -> ModelConfig:
    """Statistics and start weights decide no shape that is shown."""
    return config.model_copy(update={"normalization_stat_path": None, "pretrained_decoder_path": None})


def _stored(found: Location) -> dict[str, int]:
    """Numbers in the files, by part."""
    if found.run is None:
        shapes = exported.stored_shapes(found.path)
    else:
        tree = checkpoint.saved_shapes(found.path)
        shapes = {name: leaf.shape for name, leaf in flatten_dict(tree, sep="/").items()}
    counts: dict[str, int] = {}
    for name, shape in shapes.items():
        part = "/".join(name.split("/")[:2])
        counts[part] = counts.get(part, 0) + math.prod(shape)
    return counts


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in flatten_dict(tree).values())


def _changed(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """What is not the default."""
    changed = {}
    for name, value in values.items():
        default = defaults.get(name)
        if isinstance(value, dict) and isinstance(default, dict) and default:
            value, default = _changed(value, default), {}
        if value != default:
            changed[name] = value
    return changed


def _show(told: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    shown = told | {"protocol": {n: v for n, v in told["protocol"].items() if n != "model"}}  # which is in the config
    for name, value in shown.items():
        for field, text in _lines(name, value):
            table.add_row(field, text)
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table, highlight=False, markup=False)


def _lines(name: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [line for key, inner in value.items() for line in _lines(f"{name}.{key}", inner)]
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return [(name, f"{value:.4g}" if isinstance(value, float) else text)]


def main() -> None:
    command.run(lambda: inspect(parse()))


if __name__ == "__main__":
    main()
