"""Evaluation of a model on the validation images, and of generated samples: metrics and how they were measured."""

import dataclasses
from collections.abc import Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from vqrae_jax import sharding
from vqrae_jax.build import judges
from vqrae_jax.config import Config, DataConfig, EvaluationConfig, Metric
from vqrae_jax.data import pipeline
from vqrae_jax.errors import ConfigError, DataError
from vqrae_jax.evaluation.accumulator import SCORES, SPLIT, Accumulator
from vqrae_jax.evaluation.metrics import K1, K2, SIGMA, WINDOW
from vqrae_jax.evaluation.reference import References, accumulate, feature_program, pad_batches

CROPS = {  # what `data.eval_crop` does, for the protocol
    "center": "short side resized to {size} pixels (Pillow's bicubic with antialias), central square",
    "adm": "guided-diffusion: halved by a box filter while the short side has at least 2 x {size} pixels, then resized "
    "to {size} (Pillow's bicubic with antialias), central square",
}


@dataclasses.dataclass(frozen=True)
class Example:
    """A validation image and its reconstruction."""

    index: int  # in the dataset
    image: UInt8[np.ndarray, "S S 3"]
    reconstruction: Float[np.ndarray, "S S 3"]
    scores: dict[str, int | float]


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """The outcome of one pass over the validation images."""

    metrics: dict[str, int | float]  # "eval/NAME": value, see `Accumulator.metrics`
    accumulator: Accumulator  # with scores per image, and warnings


class Evaluator:
    """The networks, references and compiled programs of an evaluation; they are read and built once.

    The constructor reads files and waits for no other process; call `prepare` before `evaluate`. Batches are
    split over the mesh. Each process accumulates its own rows in float64; at the end every process has the sums of all.
    """

    def __init__(
        self, config: Config, task: Any, mesh: Mesh, batches: pipeline.EvaluationBatches, metrics: Collection[Metric]
    ):
        """Reads networks and references; of `task`, a `train.task.Task`, only `evaluate` is used."""
        self._config, self._mesh, self._batches = config, mesh, batches
        self._networks = judges.load_metric_networks(config.evaluation, metrics, config.loss.perceptual)
        replicated = sharding.replicated(mesh)
        self.references = References(config.evaluation, config.data, self._networks, mesh, metrics)

        def evaluate(variables: Any, frozen: Any, params: Any, batch: dict[str, jax.Array]) -> tuple[Any, Any]:
            rows = dict(task.evaluate(variables, frozen, batch))
            counts, reconstruction = rows.pop("counts", None), rows.pop("reconstruction")
            rows |= self._networks.compare(params, reconstruction, batch["image"].astype(jnp.float32) / 255)
            if "linear_probe" not in metrics:
                rows.pop("code", None)
            return rows | {name: batch[name] for name in ("mask", "index", "label")}, counts

        self._evaluate = jax.jit(evaluate, out_shardings=(sharding.over_data(mesh), replicated))
        self._add = jax.jit(jnp.add, donate_argnums=0)
        self._reconstruct = jax.jit(lambda *args: task.evaluate(*args)["reconstruction"], out_shardings=replicated)

    def prepare(self) -> None:
        """Computes what `evaluate` needs of the references; every process calls it."""
        self.references.prepare()

    def listings(self) -> dict[str, Any]:
        """Returns, by config field, which images this process has found; processes of one run compare them."""
        return {"data.eval_path": self._batches.listing()} | self.references.listings()

    def first_images(self) -> dict[str, jax.Array]:
        return sharding.place_batch({"image": next(iter(self._batches))["image"]}, self._mesh)

    def evaluate(self, variables: Any, frozen: Any) -> EvaluationResult:
        """Evaluates a model on all validation images."""
        references, counts = self.references, None

        def evaluate(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            nonlocal counts
            rows, more = self._evaluate(variables, frozen, references.params, batch)
            if more is not None:
                counts = more if counts is None else self._add(counts, more)
            return rows

        kernel_images = self._config.evaluation.kernel_images
        empty = Accumulator(self._batches.count, references.gaussians, kernel_images, references.manifolds)
        accumulator = accumulate(evaluate, self._batches, empty, self._mesh, "validation images")
        if not accumulator.images:
            raise DataError("none of the validation images can be read", field="data.eval_path")
        metrics = accumulator.metrics(None if counts is None else jax.device_get(counts))
        return EvaluationResult({f"eval/{name}": value for name, value in metrics.items()}, accumulator)

    def examples(self, result: EvaluationResult, variables: Any, frozen: Any) -> dict[str, list[Example]]:
        """Reconstructs the best, median and worst images of an evaluation again."""
        accumulator = result.accumulator
        positions = accumulator.select_examples(self._config.evaluation.examples)
        unique = np.unique(np.concatenate(list(positions.values())))
        indices = accumulator.scores("index")[unique]
        # These are few images: every process reads all of them and gives each device its part.
        images = np.stack([self._batches.image(int(i)) for i in indices])
        padded = np.pad(images, ((0, -len(images) % sharding.data_ways(self._mesh)), (0, 0), (0, 0), (0, 0)))
        batch = {"image": padded, "mask": np.ones(len(padded), bool)}
        batch = jax.tree.map(lambda x: sharding.place_array(x, sharding.over_data(self._mesh)), batch)
        reconstructions = jax.device_get(self._reconstruct(variables, frozen, batch))[: len(images)]
        scores = {name: accumulator.scores(name) for name in SCORES if accumulator.has_scores(name)}
        examples = {}
        for index, image, reconstruction, i in zip(indices, images, reconstructions, unique, strict=True):
            values = {name: float(score[i]) for name, score in scores.items()}
            examples[i] = Example(int(index), image, reconstruction, values)
        return {group: [examples[position] for position in members] for group, members in positions.items()}

    def protocol(self, result: EvaluationResult) -> dict[str, Any]:
        """Returns everything that must be known about the metrics to compare them with published ones."""
        config, images = self._config, result.accumulator.images
        return {
            "data": repr(self._batches),
            "images": images,
            "images_unreadable": self._batches.count - images,
            "crop": CROPS[config.data.eval_crop].format(size=config.data.image_size),
            "pixels": "reconstructions clipped to [0, 1], rounded to 8 bits before any network sees them",
            "psnr": "per image over all pixels and channels, then the mean",
            "ssim": f"Gaussian window {WINDOW}, sigma {SIGMA}, k1 {K1}, k2 {K2}, population variances, per channel",
            "seams": "mean absolute differences of neighbors, summed over images: border / inside over that of images",
            "weights": "moving average of the parameters, codebook as trained",
            "rfid": "reconstructions against the same images before encoding; fid: against the reference",
            "kernel": f"unbiased, (x . y / D + 1)^3, all pairs of the first {config.evaluation.kernel_images} images",
            "linear_probe": "ridge on the mean of the quantized latents of 80 % of the images; accuracy on the others",
            "model": config.model.model_dump(mode="json"),
            **self.references.protocol(),
        }


class SampleEvaluator:
    """The networks, references and compiled program that compare sets of `count` samples with a reference.

    Args:
      data: crop, image_size and eval_batch_size of the reference images.
      metrics: "inception", "encoder", "sfid" and "precision_recall" are used; the others are of reconstructions.

    Raises:
      ConfigError: no network, or a network without a reference.
      DataError, WeightsError: too few samples (field "count"), or a reference that does not fit.
    """

    def __init__(self, config: EvaluationConfig, data: DataConfig, mesh: Mesh, metrics: Collection[Metric], count: int):
        names = [name for name in judges.FEATURES if name in metrics]
        if not names:
            raise ConfigError("needs 'inception' or 'encoder'", field="evaluation.metrics", value=tuple(metrics))
        networks = judges.load_metric_networks(config, [*names, *{"sfid"}.intersection(metrics)])
        self._count, self._mesh, self.references = count, mesh, References(config, data, networks, mesh, metrics)
        for field, path in map(self.references.setting, names):
            if path is None:
                raise ConfigError("expected an .npz as ADM writes it or a folder of images", field=field, value=path)
        if count < self.references.needed:
            raise DataError(f"expected at least {self.references.needed} samples", field="count", value=count)
        self._program = feature_program(networks, self.references.params, mesh, "reconstruction")

    def compare(self, batches: Iterable[UInt8[np.ndarray, "_ H W 3"]], size: int | None = None) -> EvaluationResult:
        """Compares the first `count` samples with the references, which `prepare` computes before the first batch.

        Every process passes its part of each batch, part i with the images [i * b, (i + 1) * b). Its devices divide b,
        which is `size`, or that of the first part; only parts of the last batch may be smaller, or empty. Fewer samples
        are a DataError.
        """
        self.references.prepare()
        empty = Accumulator(self._count, self.references.gaussians, 0, self.references.manifolds, ordered=True)
        total = accumulate(self._program, pad_batches(batches, size), empty, self._mesh, "samples")
        if total.images < self._count:
            raise DataError(f"there are only {total.images} samples", field="count", value=self._count)
        return EvaluationResult({f"eval/{name}": value for name, value in total.metrics().items()}, total)

    def protocol(self) -> dict[str, Any]:
        """Returns everything that must be known about the metrics to compare them with published ones."""
        name = "FID-50k" if self._count == 50_000 else f"FID of {self._count} samples, not FID-50k"
        return {"samples": self._count, "fid": name, "inception_score_split": SPLIT} | self.references.protocol()
