"""Encode and decode as StableHLO programs that run without this package, for any batch size, on CPU, GPU and TPU."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vqrae_jax.models.vqrae import VQRAE
from vqrae_jax.pretrained import writers
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


def export_programs(module: VQRAE, variables: Any) -> tuple[dict[str, jax.export.Exported], dict[str, np.ndarray]]:
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
    """Writes `export_programs` to a folder, with a note on how to run them."""
    programs, weights = export_programs(module, variables)
    output.mkdir(parents=True, exist_ok=True)
    written = [output / f"{name}.stablehlo" for name in programs]
    for path, program in zip(written, programs.values(), strict=True):
        path.write_bytes(program.serialize())
    writers.write_safetensors(weights, output / "weights.safetensors")
    code = programs["encode"].out_avals[0]
    size, name = module.decoder.image_size, "latents" if _is_continuous(module) else "codes"
    shape = f"{code.dtype.name} [B, {', '.join(str(n) for n in code.shape[1:])}]"
    (output / "README.txt").write_text(USE.format(codes=name, size=size, shape=shape))
    return [*written, output / "weights.safetensors", output / "README.txt"]
