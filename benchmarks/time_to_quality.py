"""Measures how soon recipes reach the final quality of the PyTorch VQRAE's recipe, in seconds and in images.

python benchmarks/time_to_quality.py --images=photographs --encoder=vit-tiny --output=time_to_quality

Every variant trains a decoder of the same size on the same frozen encoder and images, with as many codes. The baseline
is PyTorch, with the PyTorch VQRAE's settings and a codebook that k-means starts, so that it does not collapse. Variants
take turns, so that a change of the machine's speed affects all. Seconds are those of training, with compilation and
input; the baseline's images are in memory. The quality is that of the moving average, on the validation images.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, Protocol

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # the checkout

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Float, UInt8

from vqrae_jax import sharding
from vqrae_jax.benchmark import stages
from vqrae_jax.benchmark.machine import describe_machine, format_machine
from vqrae_jax.benchmark.pytorch_process import child_environment, count_threads
from vqrae_jax.build import judges
from vqrae_jax.commands import command_line
from vqrae_jax.commands.command_line import count
from vqrae_jax.config import Config, EvaluationConfig, from_dict
from vqrae_jax.data import pipeline
from vqrae_jax.errors import ConfigError, UserError
from vqrae_jax.evaluation.accumulator import Accumulator
from vqrae_jax.evaluation.metrics import compare_pixels
from vqrae_jax.pretrained import writers
from vqrae_jax.quantizers.kmeans import kmeans
from vqrae_jax.train.run import open_run
from vqrae_jax.train.task import jit_step, place_horizon

BASELINE = "PyTorch, VQRAE's recipe"
QUALITY = {"psnr": "PSNR, dB", "ssim": "SSIM", "encoder_cosine": "feature distance", "encoder_rfd": "Fréchet distance"}
HIGHER = ("psnr", "ssim")
TARGETS = ("psnr", "encoder_cosine")  # what the ratio of times is computed of
SIZE, GRID = 128, 16  # pixels, and tokens per side
# The recipe, part by part: each variant has the settings of those above it.
PARTS: dict[str, dict[str, Any]] = {
    "JAX, the same recipe": {},
    "Muon, rate of 4e-3": {
        "optimizer.method": "muon",
        "optimizer.learning_rate": 4e-3,
        "optimizer.warmup_steps": 20,
        "optimizer.final_learning_rate": 1e-5,
        "optimizer.clip_norm": 1.0,
    },
    "overlapping squares": {"model.decoder_head": "overlap"},
    "edges": {"loss.gradient_weight": 1.0},
    "shallow layers": {"model.encoder_params.layers": (0, 5, -1), "model.encoder_params.fusion": "concat"},
    "16-dimensional codes": {
        "model.quantizer_params.codebook_dim": 16,
        "model.commitment_cost": 0.02,
        "model.vq_decay": 0.95,
    },
    "features of the encoder": {
        "loss.perceptual.network": "encoder",
        "loss.perceptual.weight": 0.5,
        "loss.perceptual.layers": (0, 2, 4, 6),
        "loss.perceptual.input_size": SIZE,
    },
}


class Trainer(Protocol):
    """A variant in training."""

    def train(self, steps: int) -> float:
        """Takes optimizer steps and returns their seconds."""

    def reconstruct(self) -> Float[np.ndarray, "n S S 3"]:
        """Reconstructs the validation images by the moving average of the parameters."""


class JaxTrainer:
    """A config of this package in the parts of its training loop."""

    def __init__(self, config: Config, workdir: pathlib.Path, closing: contextlib.ExitStack):
        self._run, self._state = closing.enter_context(open_run(config, workdir, jax.devices()[:1]))
        self._step = jit_step(self._run.task, self._run.mesh)
        self._horizon = place_horizon(config.train.steps, self._run.mesh)
        self._validation, task = pipeline.evaluation_batches(self._run.config.data), self._run.task
        self._reconstruct = jax.jit(lambda *arguments: task.evaluate(*arguments)["reconstruction"])

    def train(self, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            batch = sharding.place_batch({"image": next(self._run.batches)["image"]}, self._run.mesh)
            self._state, _ = self._step(self._state, self._run.frozen, batch, self._horizon)
        jax.block_until_ready(self._state)
        return time.perf_counter() - start

    def reconstruct(self) -> Float[np.ndarray, "n S S 3"]:
        parts = []
        for batch in self._validation:
            placed = {name: jnp.asarray(batch[name]) for name in ("image", "mask")}
            parts.append(
                np.asarray(self._reconstruct(self._state.inference(), self._run.frozen, placed))[batch["mask"]]
            )
        return np.concatenate(parts)


class TorchTrainer:
    """The baseline, a process of torch_training.py."""

    def __init__(self, config: Config, python: str, images: dict[str, np.ndarray], closing: contextlib.ExitStack):
        folder = pathlib.Path(closing.enter_context(tempfile.TemporaryDirectory()))
        task = stages.TokenizerTask.build(config, sharding.make_mesh(1, 1, jax.devices()[:1]))
        state, frozen, encoder = task.init(), task.frozen(), task.built.module.encoder
        sample = images["train"][:: max(len(images["train"]) // 64, 1)].astype(np.float32) / 255
        latents = jax.jit(encoder.apply)({"params": frozen["encoder"]}, sample).reshape(-1, encoder.channels)
        key, empty = jax.random.key(config.train.seed), jnp.zeros((config.model.num_embeddings, encoder.channels))
        codebook, _ = jax.jit(kmeans)(key, latents, empty, jnp.ones(len(latents), bool))
        tensors = stages.encoder_tensors(frozen["encoder"]) | stages.decoder_tensors(state.params["decoder"])
        writers.write_safetensors(tensors | images | {"codebook": np.array(codebook)}, folder / "tensors.safetensors")
        specification = stages.specification("train_step", task) | {
            "tensors": str(folder / "tensors.safetensors"), "compile": False, "threads": count_threads(),
            "batch": config.data.batch_size, "seed": config.train.seed, "steps": config.train.steps,
            "final": config.optimizer.final_learning_rate,
        }  # fmt: skip
        (folder / "specification.json").write_text(json.dumps(specification))
        programs = pathlib.Path(__file__).with_name("torch_training.py"), pathlib.Path(stages.__file__)
        self._process = closing.enter_context(subprocess.Popen(
            [python, programs[0], programs[1].with_name("torch_stages.py"), folder / "specification.json"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=child_environment(),
        ))  # fmt: skip
        self._file = folder / "reconstructions.npy"

    def train(self, steps: int) -> float:
        return self._request(steps=steps)["seconds"]

    def reconstruct(self) -> Float[np.ndarray, "n S S 3"]:
        self._request(save=str(self._file))
        return np.load(self._file)

    def _request(self, **request: Any) -> dict[str, Any]:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise UserError("PyTorch failed (see above): set --torch-python to a Python with torch and transformers")
        return json.loads(line)


class Judge:
    """Measures reconstructions of the validation images."""

    def __init__(self, images: UInt8[np.ndarray, "n S S 3"], encoder: str, encoder_cls: str):
        evaluation = EvaluationConfig(encoder_path=encoder, encoder_cls=encoder_cls, encoder_pool="mean")
        self._networks, self._images = judges.load_metric_networks(evaluation, ("encoder",)), images

        def measure(reconstruction: jax.Array, image: jax.Array) -> dict[str, jax.Array]:
            networks = self._networks
            return compare_pixels(reconstruction, image) | networks.compare(networks.params, reconstruction, image)

        self._measure = jax.jit(measure)

    def measure(self, reconstructions: Float[np.ndarray, "n S S 3"]) -> dict[str, float]:
        """Returns the values of QUALITY."""
        accumulator = Accumulator(len(self._images))
        for i in range(0, len(self._images), 20):
            image = self._images[i : i + 20].astype(np.float32) / 255
            rows = jax.device_get(self._measure(reconstructions[i : i + 20], image))
            accumulator.add({**rows, "mask": np.ones(len(image), bool), "index": np.arange(i, i + len(image))})
        metrics = accumulator.metrics()
        return {name: metrics[name] for name in QUALITY}


@dataclasses.dataclass
class Curve:
    """What was measured of one variant with one seed."""

    name: str
    seed: int
    batch: int
    points: list[dict[str, float]] = dataclasses.field(default_factory=list)  # step, seconds, and QUALITY

    def seconds_to(self, targets: dict[str, float]) -> float | None:
        """Returns the seconds to the first point that reaches all targets; None if none does."""
        for point in self.points:
            if all(point[n] >= x if n in HIGHER else point[n] <= x for n, x in targets.items()):
                return point["seconds"]
        return None


def main(arguments: list[str]) -> None:
    """Trains all variants with all seeds; writes curves.json, curves.png and prints the times."""
    args = parse(arguments)
    names = args.variants.split(";") if args.variants else [BASELINE, *PARTS]
    variants = [BASELINE, *PARTS]
    if unknown := set(names) - set(variants):
        raise ConfigError(f"must be among {variants}", field="--variants", value="; ".join(sorted(unknown)))
    print(format_machine(), flush=True)
    output = pathlib.Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    images = {split: read_images(args, split) for split in ("train", "validation")}
    judge, curves = Judge(images["validation"], args.encoder, args.encoder_cls), []
    for seed in range(args.seeds):
        with contextlib.ExitStack() as closing:
            folder = pathlib.Path(closing.enter_context(tempfile.TemporaryDirectory()))
            trainers: dict[str, Trainer] = {}
            for name in names:
                config = build_config(args, name, seed)
                if name == BASELINE:
                    trainers[name] = TorchTrainer(config, args.torch_python, images, closing)
                else:
                    trainers[name] = JaxTrainer(config, folder / name.replace("/", " "), closing)
            run = {name: Curve(name, seed, args.batch) for name in names}
            curves += run.values()
            race(trainers, run, judge, args.steps, args.points)
        write(curves, args, output)
    report(curves)


def race(trainers: dict[str, Trainer], curves: dict[str, Curve], judge: Judge, steps: int, points: int) -> None:
    """Trains all variants in turns of steps / points, and measures each after its turn."""
    seconds = dict.fromkeys(trainers, 0.0)
    ends = [round(steps * (i + 1) / points) for i in range(points)]
    for begin, end in zip([0, *ends], ends, strict=False):
        for name, trainer in trainers.items():
            seconds[name] += trainer.train(end - begin)
            point = {"step": end, "seconds": seconds[name], **judge.measure(trainer.reconstruct())}
            curves[name].points.append(point)
            values = ", ".join(f"{label} {point[key]:.4g}" for key, label in QUALITY.items())
            print(f"{name}, seed {curves[name].seed}, step {end}, {seconds[name]:.0f} s: {values}", flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder with images in train/ and val/")
    parser.add_argument("--encoder", required=True, help="folder or hub id, model.encoder_config_path")
    parser.add_argument("--encoder-cls", default="Dinov2withNorm", help="model.encoder_cls")
    parser.add_argument("--patch", type=count, default=16, help="patch size of the encoder")
    parser.add_argument("--steps", type=count, default=1000, help="optimizer steps of every variant")
    parser.add_argument("--batch", type=count, default=16, help="images per batch")
    parser.add_argument("--points", type=count, default=16, help="number of measurements")
    parser.add_argument("--seeds", type=count, default=3, help="number of seeds")
    parser.add_argument("--variants", help="names, separated by semicolons; default: all")
    parser.add_argument("--torch-python", default=sys.executable, help="a Python with torch and transformers")
    parser.add_argument(
        "--output", required=True, type=os.path.expanduser, help="folder for curves.json and curves.png"
    )
    return parser.parse_args(arguments)


def build_config(args: argparse.Namespace, name: str, seed: int) -> Config:
    """Returns the config of a variant."""
    settings: dict[str, Any] = {
        "model.encoder_cls": args.encoder_cls, "model.encoder_config_path": args.encoder,
        "loss.perceptual.encoder_cls": args.encoder_cls, "loss.perceptual.path": args.encoder,
        "model.encoder_input_size": GRID * args.patch, "model.decoder_config_path": "ViT-Tiny",
        "model.decoder_patch_size": SIZE // GRID, "model.num_embeddings": 4096,
        "data.source": "folder", "data.path": f"{args.images}/train", "data.eval_path": f"{args.images}/val",
        "data.image_size": SIZE, "data.batch_size": args.batch, "data.eval_batch_size": 20, "train.steps": args.steps,
        "train.seed": seed,
    }  # fmt: skip
    for part in PARTS if name != BASELINE else ():
        settings |= PARTS[part]
        if part == name:
            break
    return from_dict(Config, unflatten_dict(settings, sep="."))


def read_images(args: argparse.Namespace, split: str) -> UInt8[np.ndarray, "n S S 3"]:
    """Reads the images of a split as evaluation crops them."""
    path = f"{args.images}/{'train' if split == 'train' else 'val'}"
    data = from_dict(Config, {"data": {"source": "folder", "eval_path": path, "image_size": SIZE}}).data
    return np.concatenate([batch["image"][batch["mask"]] for batch in pipeline.evaluation_batches(data)])


def report(curves: list[Curve]) -> None:
    """Prints the final quality of each variant and its time to that of the baseline, medians over seeds."""
    goals = {c.seed: {n: c.points[-1][n] for n in TARGETS} for c in curves if c.name == BASELINE}
    ends = {c.seed: c.points[-1]["seconds"] for c in curves if c.name == BASELINE}
    columns = [*QUALITY.values(), "seconds", *(f"time to {QUALITY[n]}" for n in TARGETS), "time to both"]
    print(f"\n| variant | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 1)}")
    for name in dict.fromkeys(c.name for c in curves):
        own = [c for c in curves if c.name == name]
        cells = [f"{statistics.median(c.points[-1][key] for c in own):.4g}" for key in (*QUALITY, "seconds")]
        for targets in ([n] for n in TARGETS):
            cells.append(_ratio(own, goals, ends, targets))
        print(f"| {name} | {' | '.join([*cells, _ratio(own, goals, ends, TARGETS)])} |")


def _ratio(curves: list[Curve], goals: dict[int, dict[str, float]], ends: dict[int, float], names: Any) -> str:
    if not goals:
        return "-"
    times = [c.seconds_to({n: goals[c.seed][n] for n in names}) for c in curves]
    ratios = [float("inf") if t is None else t / ends[c.seed] for c, t in zip(curves, times, strict=True)]
    return f"{statistics.median(ratios):.2f}"


def write(curves: list[Curve], args: argparse.Namespace, output: pathlib.Path) -> None:
    """Writes all curves as JSON and as one picture: a row over seconds and a row over images."""
    from matplotlib.figure import Figure

    values = {"machine": describe_machine(), "arguments": vars(args), "curves": [dataclasses.asdict(c) for c in curves]}
    (output / "curves.json").write_text(json.dumps(values, indent=2))
    figure = Figure(figsize=(3.6 * len(QUALITY), 6.4), layout="constrained")
    axes = figure.subplots(2, len(QUALITY), sharey="col")
    names = list(dict.fromkeys(c.name for c in curves))
    for row, label in enumerate(("seconds of training", "images seen")):
        for axis, (key, title) in zip(axes[row], QUALITY.items(), strict=True):
            for c in curves:
                x = [p["seconds"] if row == 0 else p["step"] * c.batch for p in c.points]
                color = f"C{names.index(c.name)}"
                axis.plot(x, [p[key] for p in c.points], color=color, lw=1.3, label=c.name if c.seed == 0 else None)
            axis.set_xlabel(label)
            axis.set_title(title if row == 0 else "")
            axis.grid(alpha=0.25)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(output / "curves.png", dpi=110)


if __name__ == "__main__":
    command_line.run(lambda: main(sys.argv[1:]))
