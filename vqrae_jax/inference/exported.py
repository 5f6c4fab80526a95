"""Loads programs of `vqrae export --format=stablehlo`; a copy lies next to them and needs no vqrae_jax."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from safetensors.numpy import load_file


def load_programs(folder: str | pathlib.Path, portable: bool = False) -> list[Callable[..., jax.Array]]:
    """Returns encode(images) and decode(codes), with `portable` from the portable artifacts for one image.

    Raises:
      FileNotFoundError: the folder lacks files of the export.
      RuntimeError: this version of JAX cannot read the programs; the message says what to do.
    """
    folder, suffix = pathlib.Path(folder).expanduser(), "mlirbc" if portable else "stablehlo"
    needed = ("manifest.json", "weights.safetensors", f"encode.{suffix}", f"decode.{suffix}")
    if missing := [name for name in needed if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)} of `vqrae export --format=stablehlo`")
    manifest, weights = json.loads((folder / "manifest.json").read_text()), load_file(folder / "weights.safetensors")
    programs = []
    for name in ("encode", "decode"):
        file = folder / f"{name}.{suffix}"
        try:
            content = file.read_bytes()
            signature = manifest["programs"][name]
            programs.append(_replace_body(content, weights, **signature) if portable else _deserialize(content))
        except Exception as error:  # its class depends on what has changed
            raise RuntimeError(
                f"{file}: JAX {jax.__version__} cannot read this program, which JAX {manifest['jax']} wrote on "
                f"{manifest['written']} ({error}). jax.export reads programs of the last six months: export the "
                f"checkpoint again, install jax=={manifest['jax']}, or use load_programs(folder, portable=True)."
            ) from error
    return [functools.partial(program.call, weights) for program in programs]


def _deserialize(content: bytes) -> jax.export.Exported:
    program = jax.export.deserialize(bytearray(content))
    if program.calling_convention_version < jax.export.minimum_supported_calling_convention_version:
        raise ValueError(f"calling convention {program.calling_convention_version}")
    program.mlir_module()  # reads the StableHLO
    return program


def _replace_body(artifact: bytes, weights: Any, input: Any, output: Any) -> jax.export.Exported:
    """Exports a function of the same signature with the installed version and replaces its body."""
    stub = jax.export.export(jax.jit(lambda weights, batch: jnp.zeros(*output), keep_unused=True))
    return dataclasses.replace(stub(weights, jax.ShapeDtypeStruct(*input)), mlir_module_serialized=artifact)
