"""python -m vqrae_jax.commands.export --checkpoint=runs/quickstart --format=safetensors --output=exported

pytorch: a checkpoint of the PyTorch origin (.pt), and its latent statistics beside it.
safetensors: our own folder, see `folder`.
stablehlo: encode and decode as programs that run without this package, for any batch size, on CPU, GPU and TPU.
"""

import argparse
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vqrae_jax import config as config_lib
from vqrae_jax import storage
from vqrae_jax.commands import command_line as command
from vqrae_jax.errors import ConfigError
from vqrae_jax.inference import saving as folder
from vqrae_jax.inference.tokenizer import Tokenizer
from vqrae_jax.models.stacking import unstack_blocks
from vqrae_jax.models.vqrae import VQRAE
from vqrae_jax.pretrained import export
from vqrae_jax.quantizers.none import NoQuantizer

PLATFORMS = ("cpu", "cuda", "tpu")

USE = """Programs exported from vqrae_jax; they need jax, flatbuffers and safetensors, and no vqrae_jax.

    import jax.export
    from safetensors.flax import load_file

    weights = load_file("weights.safetensors")
    encode = jax.export.deserialize(open("encode.stablehlo", "rb").read()).call
    decode = jax.export.deserialize(open("decode.stablehlo", "rb").read()).call
    {codes} = encode(weights, images)  # images: float32 [B, {size}, {size}, 3] in [0, 1]; {codes}: {shape}
    images = decode(weights, {codes})  # float32 [B, {size}, {size}, 3] in [0, 1]
"""


def to_origin(config: config_lib.ModelConfig, variables: Any, transformers: export.Transformers = 4) -> dict[str, Any]:
    """A model as a training checkpoint of the PyTorch origin: {"model": state dict, "ema": the same, ...}.

    Raises:
      ConfigError: the origin has no such model, or would compute something else.
    """
    _check_origin_has(config)
    variables = jax.tree.map(np.asarray, variables)
    params = dict(variables["params"])
    if config.scan_layers:
        params["decoder"] = unstack_blocks(params["decoder"])
    # The head that predicts encoder features serves training only; the origin has none.
    params["decoder"] = {n: tree for n, tree in params["decoder"].items() if n != "features"}
    state = export.origin_state_dict(
        {**variables, "params": params}, config.encoder_cls, config.quantizer, transformers,
        config.quantizer_params.levels,
    )  # fmt: skip
    nothing = ("optimizer", "scheduler", "disc", "disc_optimizer", "disc_scheduler")
    return {"step": 0, "epoch": 0, "model": state, "ema": state} | dict.fromkeys(nothing)


def _check_origin_has(config: config_lib.ModelConfig) -> None:
    params = config.quantizer_params
    expected = {"ema": {"distance": (None, "l2")}, "simvq": {"distance": (None, "cosine"), "input_projection": (True,)}}
    accepted = expected.get(config.quantizer, {}) | {"codebook_dim": (None,)}
    if config.quantizer == "fsq":
        accepted = {"adapter": ("mlp",)}
    for name, values in accepted.items():
        if getattr(params, name) not in values and config.quantizer != "none":
            raise ConfigError(
                f"model.quantizer_params.{name}={getattr(params, name)!r}: the PyTorch {config.quantizer} is always "
                f"{values[-1]!r}, so that it cannot hold this model; export as safetensors or stablehlo"
            )
    if config.encoder_params.layers != (-1,):
        raise ConfigError(
            f"model.encoder_params.layers={config.encoder_params.layers}: the PyTorch encoders give their last layer "
            f"only, so that they cannot hold this model; export as safetensors or stablehlo"
        )


def to_programs(module: VQRAE, variables: Any) -> tuple[dict[str, jax.export.Exported], dict[str, np.ndarray]]:
    """encode and decode as `jax.export` programs with a symbolic batch dimension, and the weights that both take.

    encode(weights, images [B, S, S, 3]) gives codes, or latents of a continuous autoencoder; decode is its inverse and
    gives pictures in [0, 1].
    """
    weights = {name: np.asarray(leaf) for name, leaf in flatten_dict(variables, sep="/").items()}
    methods = ("encode", "decode") if _is_continuous(module) else ("encode_to_indices", "decode_from_indices")

    def one_by_one(method: str) -> Callable[..., jax.Array]:
        # Mapped over single images, all sizes inside the model are known numbers and only the mapped one is symbolic.
        def run(weights: dict[str, jax.Array], batch: jax.Array) -> jax.Array:
            tree = {"params": {}, "batch_stats": {}} | unflatten_dict(weights, sep="/")
            return jax.vmap(lambda x: module.apply(tree, x[None], method=method)[0])(batch)

        return run

    def paint(weights: dict[str, jax.Array], batch: jax.Array) -> jax.Array:
        return jnp.clip(one_by_one(methods[1])(weights, batch), 0, 1)

    size = module.decoder.image_size
    images = _symbolic((size, size, 3), jnp.float32)
    encode = one_by_one(methods[0])
    specs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), weights)
    codes = jax.eval_shape(encode, specs, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
    programs = {
        "encode": jax.export.export(jax.jit(encode), platforms=PLATFORMS)(specs, images),
        "decode": jax.export.export(jax.jit(paint), platforms=PLATFORMS)(
            specs, _symbolic(codes.shape[1:], codes.dtype)
        ),
    }
    return programs, weights


def _is_continuous(module: VQRAE) -> bool:
    return isinstance(module.quantizer, NoQuantizer)


def _symbolic(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*jax.export.symbolic_shape("b"), *shape), dtype)


def write_programs(module: VQRAE, variables: Any, output: pathlib.Path) -> list[pathlib.Path]:
    """Writes `to_programs` to a folder, with a note on how to run them."""
    programs, weights = to_programs(module, variables)
    output.mkdir(parents=True, exist_ok=True)
    written = [output / f"{name}.stablehlo" for name in programs]
    for path, program in zip(written, programs.values(), strict=True):
        path.write_bytes(program.serialize())
    export.write_safetensors(weights, output / "weights.safetensors")
    code = programs["encode"].out_avals[0]
    size, name = module.decoder.image_size, "latents" if _is_continuous(module) else "codes"
    shape = f"{code.dtype.name} [B, {', '.join(str(n) for n in code.shape[1:])}]"
    (output / "README.txt").write_text(USE.format(codes=name, size=size, shape=shape))
    return [*written, output / "weights.safetensors", output / "README.txt"]


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
    output = storage.at(args.output)
    if args.format == "pytorch" and output.suffix not in (".pt", ".pth"):
        raise ConfigError(f"--output={output}: a PyTorch checkpoint is a .pt or .pth file")
    tokenizer = Tokenizer.load(args.checkpoint, args.step)
    if args.format == "safetensors":
        tokenizer.save_pretrained(output)
        return [output / folder.CONFIG, output / folder.WEIGHTS]
    if args.format == "stablehlo":
        with storage.staged(output) as place:
            written = write_programs(tokenizer.module, jax.device_get(tokenizer.variables), place)
        return [output / file.name for file in written]
    variables = jax.device_get(tokenizer.trained)
    states = {output: to_origin(tokenizer.config, variables, args.transformers)}
    if statistics := export.origin_statistics(variables):
        states[output.with_name(f"{output.stem}_stat.pt")] = statistics
    for file, state in states.items():
        with storage.staged(file) as place:
            place.parent.mkdir(parents=True, exist_ok=True)
            export.write_torch(state, place)
    return list(states)


def main() -> None:
    command.run(lambda: print("wrote " + ", ".join(str(path) for path in run(parse()))))


if __name__ == "__main__":
    main()
