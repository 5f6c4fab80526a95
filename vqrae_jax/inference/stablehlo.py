"""Export of encode and decode as StableHLO programs that run without this package, on CPU, GPU and TPU."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vqrae_jax.models.vqrae import VQRAE
from vqrae_jax.pretrained import writers

PLATFORMS = ("cpu", "cuda", "tpu")

README = """Programs exported from vqrae_jax; they need jax, flatbuffers and safetensors, but not vqrae_jax.

    import jax.export
    from safetensors.flax import load_file

    weights = load_file("weights.safetensors")
    encode = jax.export.deserialize(open("encode.stablehlo", "rb").read()).call
    decode = jax.export.deserialize(open("decode.stablehlo", "rb").read()).call
    {codes} = encode(weights, images)  # images: float32 [B, {size}, {size}, 3] in [0, 1]; {codes}: {shape}
    images = decode(weights, {codes})  # float32 [B, {size}, {size}, 3] in [0, 1]
"""


def export_programs(module: VQRAE, variables: Any) -> tuple[dict[str, jax.export.Exported], dict[str, np.ndarray]]:
    """Returns the programs "encode" and "decode" for any batch size, and the weights that both take.

    encode(weights, images [B, S, S, 3]) returns indices, or latents of a continuous autoencoder; decode(weights, codes)
    returns images in [0, 1].
    """
    weights = {name: np.asarray(leaf) for name, leaf in flatten_dict(variables, sep="/").items()}
    discrete, size = module.quantizer.has_indices, module.decoder.image_size
    methods = ("encode_to_indices", "decode_from_indices") if discrete else ("encode", "decode")

    def call(method: str, weights: dict[str, jax.Array], batch: jax.Array) -> jax.Array:
        tree = {"params": {}, "batch_stats": {}} | unflatten_dict(weights, sep="/")
        # With a map over single images, only the mapped axis is symbolic, and all sizes inside the model are known.
        return jax.vmap(lambda x: module.apply(tree, x[None], method=method)[0])(batch)

    def encode(weights: dict[str, jax.Array], images: jax.Array) -> jax.Array:
        return call(methods[0], weights, images)

    def decode(weights: dict[str, jax.Array], codes: jax.Array) -> jax.Array:
        return jnp.clip(call(methods[1], weights, codes), 0, 1)

    def export(function: Callable[..., jax.Array], row: jax.ShapeDtypeStruct) -> jax.export.Exported:
        batch = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("b"), *row.shape[1:]), row.dtype)
        return jax.export.export(jax.jit(function), platforms=PLATFORMS)(shapes, batch)

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), weights)
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    code = jax.eval_shape(encode, shapes, image)
    return {"encode": export(encode, image), "decode": export(decode, code)}, weights


def write_programs(module: VQRAE, variables: Any, output: pathlib.Path) -> list[pathlib.Path]:
    """Writes programs, weights and a README to a folder; returns the files."""
    programs, weights = export_programs(module, variables)
    output.mkdir(parents=True, exist_ok=True)
    files = [output / f"{name}.stablehlo" for name in programs]
    for file, program in zip(files, programs.values(), strict=True):
        file.write_bytes(program.serialize())
    writers.write_safetensors(weights, output / "weights.safetensors")
    code = programs["encode"].out_avals[0]
    shape = f"{code.dtype.name} [B, {', '.join(str(n) for n in code.shape[1:])}]"
    name = "codes" if module.quantizer.has_indices else "latents"
    (output / "README.txt").write_text(README.format(codes=name, size=module.decoder.image_size, shape=shape))
    return [*files, output / "weights.safetensors", output / "README.txt"]
