"""Evaluation of a model on the validation images: metrics, examples, and the protocol that they were measured by."""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from vqrae_jax import __version__, distributed, sharding, storage
from vqrae_jax.build import judges
from vqrae_jax.config import Config, Metric
from vqrae_jax.data import pipeline
from vqrae_jax.errors import DataError
from vqrae_jax.evaluation import reference
from vqrae_jax.evaluation.accumulator import SCORES, Accumulator
from vqrae_jax.evaluation.metrics import K1, K2, SIGMA, WINDOW
from vqrae_jax.evaluation.moments import Gaussian
from vqrae_jax.progress import progress

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

    The constructor reads files and waits for no other process; call `prepare` once before `evaluate`. Batches are split
    over the mesh. Each process accumulates its own rows in float64; at the end every process receives the sums of all.
    """

    def __init__(
        self, config: Config, task: Any, mesh: Mesh, batches: pipeline.EvaluationBatches, metrics: Collection[Metric]
    ):
        """Reads networks and references; of `task`, a `train.task.Task`, only `evaluate` is used."""
        self._config, self._mesh, self._batches = config, mesh, batches
        self._networks = judges.load_metric_networks(config.evaluation, metrics, config.loss.perceptual)
        replicated = sharding.replicated(mesh)
        self._params = jax.tree.map(lambda x: sharding.place_array(x, replicated), self._networks.params)
        self._widths = {n: judges.feature_width(self._networks, n) for n in judges.FEATURES if n in metrics}
        self._references: dict[str, Gaussian] = {}
        self._folders: dict[str, pipeline.EvaluationBatches] = {}  # images of references that `prepare` computes
        for name in self._widths:
            self._read_reference(name)

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
        """Computes the references that are folders of images; every process reads its share of the images."""
        for name, batches in self._folders.items():
            field, path = self._reference(name)
            moments = reference.compute_feature_moments(self._networks, self._params, batches, self._mesh)[name]
            if moments.count < 2:
                raise DataError(
                    f"only {moments.count} of its images can be read; at least two are needed", field=field, value=path
                )
            self._references[name] = moments.gaussian()

    def listings(self) -> dict[str, Any]:
        """Returns, by config field, which images this process has found; processes of one run compare them."""
        references = {self._reference(name)[0]: batches.listing() for name, batches in self._folders.items()}
        return {"data.eval_path": self._batches.listing()} | references

    def first_images(self) -> dict[str, jax.Array]:
        return sharding.place_batch({"image": next(iter(self._batches))["image"]}, self._mesh)

    def evaluate(self, variables: Any, frozen: Any) -> EvaluationResult:
        """Evaluates a model on all validation images."""
        settings = self._batches.count, self._references, self._config.evaluation.kernel_images
        local, accumulator, counts, pending = Accumulator(*settings), Accumulator(*settings), None, None
        for number, batch in enumerate(progress(self._batches, len(self._batches), "batches of validation images")):
            rows, batch_counts = self._evaluate(variables, frozen, self._params, self._place(number, batch))
            if batch_counts is not None:
                counts = batch_counts if counts is None else self._add(counts, batch_counts)
            if pending is not None:  # fetched while the device works on the next batch
                local.add(_local_rows(pending))
            pending = rows
        local.add(_local_rows(pending))
        for arrays in distributed.iterate_arrays(local.arrays()):
            accumulator.merge_arrays(arrays)
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
            "networks": {name: fields | self._describe(name) for name, fields in self._networks.protocol.items()},
            "model": config.model.model_dump(mode="json"),
            "jax": jax.__version__,
            "vqrae_jax": __version__,
            "devices": f"{self._mesh.size} x {self._mesh.devices.flat[0].device_kind}",
        }

    def _describe(self, name: str) -> dict[str, Any]:
        if name not in self._widths:
            return {}
        statistics = None
        if gaussian := self._references.get(name):
            path = self._reference(name)[1]
            statistics = {"source": path, "images": gaussian.count, "sha256": gaussian.digest()}
        return {"features": self._widths[name], "reference": statistics}

    def _place(self, number: int, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        (share, shares), local = sharding.data_share(self._mesh), len(batch["mask"])
        index = ((number * shares + share) * local + np.arange(local)).astype(np.int32)
        return sharding.place_batch({n: batch[n] for n in ("image", "mask", "label")} | {"index": index}, self._mesh)

    def _reference(self, name: str) -> tuple[str, str | None]:
        return f"evaluation.{name}_reference", getattr(self._config.evaluation, f"{name}_reference")

    def _read_reference(self, name: str) -> None:
        """Reads the statistics of an .npz, or finds the images of a folder; they are cropped as validation images."""
        field, path = self._reference(name)
        if path is None:
            return
        if not storage.resolve_path(path).is_dir():
            network = self._networks.protocol[name]
            self._references[name] = reference.read_reference(
                storage.download(path), self._widths[name], field, network
            )
            return
        data = self._config.data.model_copy(update={"source": "folder", "eval_path": str(path)})
        share, shares = sharding.data_share(self._mesh)
        try:
            self._folders[name] = pipeline.evaluation_batches(data, process_index=share, process_count=shares)
        except DataError as error:
            raise error.renamed({"data.eval_path": field}) from None


def _local_rows(rows: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    return {name: sharding.own_rows(x) for name, x in rows.items()}
