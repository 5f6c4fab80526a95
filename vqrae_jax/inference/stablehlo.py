"""Export of encode and decode as StableHLO programs that run without this package, on CPU, GPU and TPU."""

import datetime
import importlib.metadata
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vqrae_jax import __version__
from vqrae_jax.inference import exported
from vqrae_jax.models.vqrae import VQRAE
from vqrae_jax.pretrained import writers

PLATFORMS = ("cpu", "cuda", "tpu")

README = """Programs exported from vqrae_jax; they need jax, flatbuffers and safetensors, but not vqrae_jax.

    from exported import load_programs

    encode, decode = load_programs(".")
    {codes} = encode(images)  # images: float32 [B, {size}, {size}, 3] in [0, 1]; {codes}: {shape}
    images = decode({codes})  # float32 [B, {size}, {size}, 3] in [0, 1]

JAX reads .stablehlo files with its releases of the six months after that of jaxlib {jaxlib}: until {expires_by} at the
latest. The .mlirbc files are portable artifacts for one image, which StableHLO promises to read for five years. Their
arguments are the tensors of weights.safetensors, sorted by name, and the batch: load_programs(".", portable=True).
"""


def export_programs(
    module: VQRAE, variables: Any, portable: bool = False
) -> tuple[dict[str, jax.export.Exported], dict[str, np.ndarray]]:
    """Returns the programs "encode" and "decode", and the weights that both take.

    encode(weights, images [B, S, S, 3]) returns indices, or latents of a continuous autoencoder; decode(weights, codes)
    returns images in [0, 1]. They take any batch size on all PLATFORMS; portable ones take one image, and consist only
    of instructions that StableHLO specifies.
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
        if portable:
            return jax.export.export(jax.jit(function, keep_unused=True), platforms=PLATFORMS[:1])(shapes, row)
        batch = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("b"), *row.shape[1:]), row.dtype)
        return jax.export.export(jax.jit(function), platforms=PLATFORMS)(shapes, batch)

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), weights)
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    code = jax.eval_shape(encode, shapes, image)
    return {"encode": export(encode, image), "decode": export(decode, code)}, weights


def write_programs(module: VQRAE, variables: Any, output: pathlib.Path) -> list[pathlib.Path]:
    """Writes programs, weights, versions, a loader and a README to a folder; returns the files."""
    programs, weights = export_programs(module, variables)
    portable, _ = export_programs(module, variables, portable=True)
    manifest = describe_programs(programs, portable)
    code = programs["encode"].out_avals[0]
    shape = f"{code.dtype.name} [B, {', '.join(str(n) for n in code.shape[1:])}]"
    name = "codes" if module.quantizer.has_indices else "latents"
    readme = README.format(codes=name, size=module.decoder.image_size, shape=shape, **manifest)
    files = {f"{name}.stablehlo": program.serialize() for name, program in programs.items()}
    files |= {f"{name}.mlirbc": program.mlir_module_serialized for name, program in portable.items()}
    files |= {"manifest.json": json.dumps(manifest, indent=2).encode(), "README.txt": readme.encode()}
    files["exported.py"] = pathlib.Path(exported.__file__).read_bytes()
    output.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (output / name).write_bytes(content)
    writers.write_safetensors(weights, output / "weights.safetensors")
    return [output / name for name in (*files, "weights.safetensors")]


def describe_programs(programs: dict[str, jax.export.Exported], portable: dict[str, jax.export.Exported]) -> Any:
    """Returns versions, the dates of writing and of the last release that reads them, and portable signatures."""
    today, first = datetime.datetime.now(datetime.UTC).date(), programs["encode"]
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    stablehlo = re.search(rb"StableHLO_v([\d.]+)", first.mlir_module_serialized)[1].decode()
    ends = {name: {"input": program.in_avals[-1], "output": program.out_avals[0]} for name, program in portable.items()}
    return {
        "vqrae_jax": __version__, **versions,
        "stablehlo": stablehlo, "calling_convention": first.calling_convention_version,
        "written": str(today), "expires_by": str(today + datetime.timedelta(days=182)),
        "programs": jax.tree.map(lambda array: (array.shape, array.dtype.name), ends),
    }  # fmt: skip
