"""Measures error and use of codebooks over their size K, on the latents of a frozen encoder.

python benchmarks/codebook_law.py --images=photographs --encoder=vit-tiny --output=codebook_law

Random crops of the training images are encoded once, and their leading principal axes are the latents. Every quantizer
sees each latent once per epoch, in random batches. Lloyd's k-means, which sees all latents in each of its iterations,
is the reference. Layers of vector-quantize-pytorch train on the same batches in a process of PyTorch. Rows that the
output folder has from an earlier run are not measured again.
"""

import argparse
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # the checkout

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from vqrae_jax.benchmark.machine import describe_machine, format_machine
from vqrae_jax.benchmark.pytorch_process import child_environment, count_threads
from vqrae_jax.build.tokenizer import build_tokenizer, freeze_encoder
from vqrae_jax.commands import command_line
from vqrae_jax.commands.command_line import count
from vqrae_jax.config import DataConfig, ModelConfig, from_dict
from vqrae_jax.data import pipeline
from vqrae_jax.errors import ConfigError
from vqrae_jax.evaluation import codebook_health
from vqrae_jax.quantizers.base import Quantizer
from vqrae_jax.quantizers.factory import create
from vqrae_jax.quantizers.nearest import nearest
from vqrae_jax.quantizers.statistics import code_counts, code_totals

IMAGES = 20  # per batch of the encoder
ROWS = 2**15  # latents that are evaluated at once
LLOYD_ITERATIONS = 10
RATE = 3e-3  # of Adam, constant, relative to the standard deviation of the latents
# The model section of each quantizer. Codebooks without decoder: only the latents are approximated.
MODELS: dict[str, dict[str, Any]] = {
    "ema": {"quantizer": "ema"},
    "ema, angle": {"quantizer": "ema", "quantizer_params": {"distance": "angle"}},
    "vq": {"quantizer": "vq"},
    "vq, revival": {"quantizer": "vq", "quantizer_params": {"revival_decay": 0.9}},
    "simvq": {"quantizer": "simvq", "quantizer_params": {"distance": "l2"}},
    "simvq, bridge": {"quantizer": "simvq", "quantizer_params": {"distance": "l2", "bridge_group": 16}},
    "ibq": {"quantizer": "ibq"},
}
PYTORCH = {
    "VectorQuantize, PyTorch": ("VectorQuantize", {"kmeans_init": True, "threshold_ema_dead_code": 2}),
    "SimVQ, PyTorch": ("SimVQ", {}),
}
LLOYD = "Lloyd's k-means"
# Quantizer -> its largest codebook, and the reason. N x K numbers in float32 are 8.6 GB for N = 16,384 and K = 2^17.
LARGEST = {
    LLOYD: (2**16, "each iteration searches all latents"),
    "ibq": (2**14, "it needs N x K probabilities and their gradients"),
    "VectorQuantize, PyTorch": (2**14, "it needs N x K distances and one-hot assignments"),
    "SimVQ, PyTorch": (2**16, "it needs N x K distances"),
}
# Lines of the picture, and the shares of unused codes at its ticks; the last one includes zero.
STYLES = {
    LLOYD: {"color": "black", "linestyle": "--", "marker": "x", "zorder": 4},
    "ema": {"color": "#0b5cad", "marker": "o", "linewidth": 3.0},
    "ema, angle": {"color": "#5fb0e8", "marker": "o"},
    "simvq": {"color": "#2e8b57", "marker": "D"},
    "simvq, bridge": {"color": "#8cc63f", "marker": "D"},
    "vq": {"color": "#c8500a", "marker": "s"},
    "vq, revival": {"color": "#f5a623", "marker": "s"},
    "ibq": {"color": "#7b4fb5", "marker": "v"},
    "VectorQuantize, PyTorch": {"color": "#d62f7a", "linestyle": ":", "marker": "P"},
    "SimVQ, PyTorch": {"color": "#777777", "linestyle": ":", "marker": "X"},
}
UNUSED = (0.9, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.001, 0.0001)

# Maps latents [n, C] to quantized latents [n, C] and indices [n].
Quantize = Callable[[Array], tuple[Array, Array]]


def main(arguments: list[str]) -> None:
    """Measures all quantizers at all sizes; writes law.json and law.png, and prints the rows of a table."""
    args = parse(arguments)
    unknown = set(args.quantizers) - {LLOYD, *MODELS, *PYTORCH}
    if unknown:
        accepted = "; ".join([LLOYD, *MODELS, *PYTORCH])
        raise ConfigError(f"must be names of {accepted}", field="--quantizers", value="; ".join(sorted(unknown)))
    output = pathlib.Path(args.output)
    rows = read_rows(args, output)
    print(format_machine())
    output.mkdir(parents=True, exist_ok=True)
    train, val = encode(args)
    print(f"{len(train)} latents for training, {len(val)} for validation, {train.shape[1]} axes", flush=True)
    print("| quantizer | K | error / variance | use, training | use, validation | perplexity | seconds |")
    print("|" + " --- |" * 7)
    for bits in args.bits:
        for name in args.quantizers:
            if (name, 2**bits) in {(row["quantizer"], row["K"]) for row in rows}:
                continue
            largest, reason = LARGEST.get(name, (2**bits, ""))
            if 2**bits > largest:
                print(f"| {name} | {2**bits} | - | - | - | - | not measured: {reason} |", flush=True)
                continue
            start = time.perf_counter()
            try:
                quantize = fit(name, 2**bits, train, args)
            except subprocess.CalledProcessError as error:  # -9: killed, out of memory
                ended = f"PyTorch's process ended with {error.returncode}"
                print(f"| {name} | {2**bits} | - | - | - | - | not measured: {ended} |", flush=True)
                continue
            seconds = time.perf_counter() - start
            row = {"quantizer": name, "K": 2**bits, **evaluate(quantize, 2**bits, train, val), "seconds": seconds}
            rows.append(row)
            values = "{error:.4f} | {use:.2%} | {use_val:.1%} | {perplexity:.0f} | {seconds:.0f}".format(**row)
            print(f"| {name} | {2**bits} | {values} |", flush=True)
            write(rows, args, output)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder with images in train/ and val/")
    parser.add_argument("--encoder", required=True, help="folder or hub id, model.encoder_config_path")
    parser.add_argument("--encoder-cls", default="Dinov2withNorm", help="model.encoder_cls")
    parser.add_argument("--size", type=count, default=224, help="pixels, model.encoder_input_size")
    parser.add_argument("--crops", type=count, default=4, help="random crops of each training image")
    parser.add_argument("--axes", type=count, default=32, help="principal axes that are the latents")
    parser.add_argument("--batch", type=count, default=16_384, help="latents per step")
    parser.add_argument("--epochs", type=count, default=1, help="times that each latent is seen")
    parser.add_argument("--bits", type=lambda text: [int(n) for n in text.split(",")], default=[12, 14, 16, 17])
    parser.add_argument(
        "--quantizers", type=lambda text: text.split(";"), default=[LLOYD, *MODELS, *PYTORCH],
        help="names, separated by semicolons; default: all",
    )  # fmt: skip
    parser.add_argument("--torch-python", default=sys.executable, help="a Python with vector-quantize-pytorch")
    parser.add_argument("--output", required=True, type=os.path.expanduser, help="folder for law.json and law.png")
    return parser.parse_args(arguments)


def read_rows(args: argparse.Namespace, output: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the rows of an earlier run with the same latents and batches."""
    if not (output / "law.json").exists():
        return []
    values = json.loads((output / "law.json").read_text())
    for name in ("images", "encoder", "encoder_cls", "size", "crops", "axes", "batch", "epochs"):
        if values["arguments"][name] != getattr(args, name):
            problem = f"is {values['arguments'][name]} in law.json of --output; choose another folder"
            raise ConfigError(problem, field=f"--{name}", value=getattr(args, name))
    return values["rows"]


def encode(args: argparse.Namespace) -> tuple[Float[np.ndarray, "n C"], Float[np.ndarray, "m C"]]:
    """Returns latents of random crops of the training images and of the validation images, along principal axes."""
    model = {"encoder_cls": args.encoder_cls, "encoder_config_path": args.encoder, "encoder_input_size": args.size}
    built = freeze_encoder(build_tokenizer(from_dict(ModelConfig, model | {"decoder_config_path": "ViT-Nano"})))
    encoder, params = built.module.encoder, {"params": jax.device_put(built.pretrained["encoder"])}
    apply = jax.jit(lambda image: encoder.apply(params, image.astype(jnp.float32) / 255))
    data = from_dict(DataConfig, {
        "path": f"{args.images}/train", "eval_path": f"{args.images}/val", "image_size": args.size, "resize": 1.15,
        "batch_size": IMAGES, "eval_batch_size": IMAGES,
    })  # fmt: skip
    batches = pipeline.train_batches(data, seed=0)
    steps = args.crops * (len(batches.source) // IMAGES)
    train = np.concatenate([np.asarray(apply(next(batches)["image"])) for _ in range(steps)])
    batches.close()
    val = [np.asarray(apply(batch["image"]))[batch["mask"]] for batch in pipeline.evaluation_batches(data)]
    train, val = (x.reshape(-1, x.shape[-1]) for x in (train, np.concatenate(val)))
    mean = train.mean(0)
    _, basis = np.linalg.eigh(np.cov(train[::16], rowvar=False))
    return tuple(((x - mean) @ basis[:, : -args.axes - 1 : -1]).astype(np.float32) for x in (train, val))


def fit(name: str, size: int, train: Float[np.ndarray, "n C"], args: argparse.Namespace) -> Quantize:
    """Trains a codebook of `size` embeddings."""
    if name in MODELS:
        quantizer = create(from_dict(ModelConfig, MODELS[name] | {"num_embeddings": size}), train.shape[1], 1)
        variables = train_quantizer(quantizer, train, args)
        return lambda z: _outputs(quantizer.apply(variables, z))
    codebook = lloyd(train, size, LLOYD_ITERATIONS) if name == LLOYD else train_pytorch(name, size, train, args)

    def quantize(z: Array) -> tuple[Array, Array]:
        indices = nearest(z, codebook)
        return codebook[indices], indices

    return quantize


def train_quantizer(quantizer: Quantizer, train: Float[np.ndarray, "n C"], args: argparse.Namespace) -> Any:
    """Returns the variables of a quantizer after its training by Adam, without a decoder."""
    optimizer = optax.adam(RATE * float(train.std()))
    variables = jax.jit(quantizer.init)(jax.random.key(0), train[:1])
    params, state = (variables.get(name, {}) for name in ("params", "batch_stats"))

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params: Any, state: Any, moments: Any, z: Array, key: Array) -> tuple[Any, Any, Any]:
        def loss(params: Any) -> tuple[Array, Any]:
            variables = {"params": params, "batch_stats": state}
            quantized, updated = quantizer.apply(variables, z, True, mutable=["batch_stats"], rngs={"codes": key})
            return quantized.loss, updated.get("batch_stats", {})

        gradients, updated = jax.grad(loss, has_aux=True)(params)
        updates, moments = optimizer.update(gradients, moments)
        return optax.apply_updates(params, updates), updated, moments

    carry = params, state, optimizer.init(params)
    for i, rows in enumerate(batches(len(train), args)):
        carry = step(*carry, train[rows], jax.random.fold_in(jax.random.key(1), i))
    return jax.block_until_ready({"params": carry[0], "batch_stats": carry[1]})


def batches(total: int, args: argparse.Namespace) -> Iterator[Int[np.ndarray, " batch"]]:
    """Yields the rows of each batch; every epoch is a random order."""
    for epoch in range(args.epochs):
        order = np.random.default_rng(epoch).permutation(total)
        for i in range(0, total - args.batch + 1, args.batch):
            yield order[i : i + args.batch]


def train_pytorch(name: str, size: int, train: Float[np.ndarray, "n C"], args: argparse.Namespace) -> Array:
    """Returns the codebook of a layer of vector-quantize-pytorch after the same batches."""
    layer, settings = PYTORCH[name]
    with tempfile.TemporaryDirectory() as folder:
        paths = {part: os.path.join(folder, f"{part}.npy") for part in ("latents", "order", "codebook")}
        np.save(paths["latents"], train)
        np.save(paths["order"], np.stack(list(batches(len(train), args))))
        specification = paths | {
            "layer": layer, "settings": settings, "size": size, "rate": RATE * float(train.std()),
            "threads": count_threads(),
        }  # fmt: skip
        program = pathlib.Path(__file__).with_name("torch_codebook.py")
        subprocess.run([args.torch_python, program, json.dumps(specification)], check=True, env=child_environment())
        return jnp.asarray(np.load(paths["codebook"]))


def lloyd(latents: Float[np.ndarray, "N C"], size: int, iterations: int) -> Float[Array, "K C"]:
    """Runs k-means on all latents, started from random ones; an embedding without latents stays where it is."""
    start = np.random.default_rng(0).permutation(len(latents))[np.arange(size) % len(latents)]

    @jax.jit
    def iterate(codebook: Float[Array, "K C"], latents: Float[Array, "N C"]) -> Float[Array, "K C"]:
        indices = nearest(latents, codebook)
        counts = code_counts(indices, size)[:, None]
        return jnp.where(counts > 0, code_totals(latents, indices, size) / jnp.maximum(counts, 1), codebook)

    latents = jnp.asarray(latents)
    codebook = latents[start]
    for _ in range(iterations):
        codebook = iterate(codebook, latents)
    return jax.block_until_ready(codebook)


def evaluate(quantize: Quantize, size: int, train: Float[np.ndarray, "n C"], val: Float[np.ndarray, "m C"]) -> dict:
    """Returns the error relative to the variance and the perplexity on `val`, and the shares of embeddings in use."""

    @jax.jit
    def measure(z: Array) -> tuple[Array, Array]:
        quantized, indices = quantize(z)
        return jnp.sum((quantized - z) ** 2), code_counts(indices, size)

    totals = {}
    for name, latents in (("train", train), ("val", val)):
        parts = [jax.device_get(measure(latents[i : i + ROWS])) for i in range(0, len(latents), ROWS)]
        totals[name] = [sum(part) for part in zip(*parts, strict=True)]
    error, counts = totals["val"]
    health = codebook_health.health(counts)
    return {
        "error": float(error / val.size / val.var(0).mean()),
        "use": codebook_health.health(totals["train"][1])["usage"],
        "use_val": health["usage"],
        "perplexity": health["perplexity"],
    }


def write(rows: list[dict[str, Any]], args: argparse.Namespace, output: pathlib.Path) -> None:
    """Writes all rows as JSON and as a picture."""
    values = {"machine": describe_machine(), "arguments": vars(args), "rows": rows}
    (output / "law.json").write_text(json.dumps(values, indent=2))
    plot(rows, output / "law.png")


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Plots error and use over K; a triangle at the edge of the left plot stands for a larger error, given as a number.

    The axis of the use is logarithmic in the share of unused codes: 99 and 99.9 % are as far apart as 90 and 99 %.
    """
    from matplotlib.figure import Figure

    sizes = sorted({row["K"] for row in rows})
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    errors, uses = figure.subplots(1, 2)
    top = 1.2 * float(np.median([row["error"] for row in rows]))
    for name in [name for name in STYLES if name in {row["quantizer"] for row in rows}]:
        own = sorted((row for row in rows if row["quantizer"] == name), key=lambda row: row["K"])
        style = {"label": name, "markersize": 5, "linewidth": 1.8, "clip_on": False, "zorder": 3} | STYLES[name]
        inside = [row for row in own if row["error"] <= top]
        errors.plot([row["K"] for row in inside], [row["error"] for row in inside], **style)
        for row in own:
            if row["error"] > top:
                errors.plot(row["K"], top, **style | {"marker": "^", "label": None})
                errors.annotate(f"{row['error']:.2f}", (row["K"], top), (0, -13), textcoords="offset points",
                                ha="center", fontsize=8, color=style["color"])  # fmt: skip
        uses.plot([row["K"] for row in own], [max(1 - row["use"], UNUSED[-1]) for row in own], **style)
    errors.set_ylim(top=top)
    errors.set_title("error / variance on validation images", fontsize=10)
    uses.set_yscale("log")
    uses.set_ylim(UNUSED[0], UNUSED[-1])
    uses.set_yticks(UNUSED, [f"{100 - 100 * x:g} %" for x in UNUSED])
    uses.minorticks_off()
    uses.set_title("codes in use on training latents", fontsize=10)
    for axis in (errors, uses):
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.set_xlabel("size of the codebook K")
        axis.tick_params(labelsize=9)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*errors.get_legend_handles_labels(), loc="outside right center", fontsize=9, frameon=False)
    figure.savefig(path, dpi=130, bbox_inches="tight")


def _outputs(quantized: Any) -> tuple[Array, Array]:
    return quantized.z, quantized.indices


if __name__ == "__main__":
    command_line.run(lambda: main(sys.argv[1:]))
