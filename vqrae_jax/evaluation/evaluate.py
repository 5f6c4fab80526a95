"""One pass over the validation images: what is measured, with which networks and by what protocol."""

import dataclasses
import functools
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
from vqrae_jax.evaluation.evaluator import Evaluator
from vqrae_jax.evaluation.moments import Gaussian
from vqrae_jax.evaluation.ssim import K1, K2, SIGMA, WINDOW

CROPS = {  # `data.eval_crop`, for the protocol
    "center": "short side to {size} pixels by Pillow's bicubic with antialias, central square",
    "adm": "guided-diffusion's: halved by a box filter while the short side has twice {size} pixels, then to {size} by "
    "Pillow's bicubic with antialias, central square",
}


@dataclasses.dataclass(frozen=True)
class Example:
    """A validation picture and what became of it."""

    index: int  # in the dataset
    image: UInt8[np.ndarray, "S S 3"]
    reconstruction: Float[np.ndarray, "S S 3"]
    scores: dict[str, float]


class Measurement:
    """Everything that evaluation needs beside the model; networks and references are read once, here.

    Making one reads files, and waits for no other process; `begin`, once, comes before `run`.

    A batch is spread over the mesh, and pictures stay where they are. Each process reads numbers, features and codes of
    its own rows and adds them up in float64; at the end every process is told the sums of all.
    """

    def __init__(
        self, config: Config, task: Any, mesh: Mesh, batches: pipeline.EvaluationBatches, figures: Collection[Metric]
    ):
        self._config, self._mesh, self._batches, self._figures = config, mesh, batches, tuple(figures)
        self._networks = judges.load_metric_networks(config.evaluation, figures, config.loss.perceptual)
        self._widths = {n: judges.feature_width(self._networks, n) for n in judges.FEATURES if n in figures}
        where = sharding.replicated(mesh)
        self._params = jax.tree.map(lambda x: sharding.place_array(x, where), self._networks.params)
        self._references: dict[str, Gaussian] = {}
        self._folders: dict[str, pipeline.EvaluationBatches] = {}  # of references still to be computed
        for name in self._widths:
            self._read_reference(name)
        self._step = jax.jit(functools.partial(self._measure, task), out_shardings=(sharding.over_data(mesh), where))
        self._add = jax.jit(jnp.add, donate_argnums=0)
        self._paint = jax.jit(lambda *args: task.evaluate_batch(*args)["reconstruction"], out_shardings=where)

    def begin(self) -> None:
        """Computes the references that are folders of images; all processes together, each its share of the images.

        Raises:
          DataError: fewer than two images can be read.
        """
        for name, batches in self._folders.items():
            field, path = self._reference(name)
            moments = reference.feature_moments(self._networks, self._params, batches, self._mesh)[name]
            if moments.count < 2:
                raise DataError(f"{field}={path!r}: {moments.count} of its images can be read; two are needed")
            self._references[name] = moments.gaussian()

    def listings(self) -> dict[str, Any]:
        """Of the validation images and of those references that are folders, by field, see `TrainBatches.listing`."""
        references = {self._reference(name)[0]: batches.listing() for name, batches in self._folders.items()}
        return {"data.eval_path": self._batches.listing()} | references

    def run(self, variables: Any, frozen: Any) -> tuple[Evaluator, dict[str, float]]:
        """The pass; figures are those of `Evaluator.figures`.

        Raises:
          DataError: no image can be read.
        """
        evaluator = self._evaluator()
        counts = waiting = None
        for number, batch in enumerate(self._batches):
            rows, chosen = self._step(variables, frozen, self._params, self._placed(number, batch))
            if chosen is not None:
                counts = chosen if counts is None else self._add(counts, chosen)
            if waiting is not None:  # read while the next batch is under way
                evaluator.add(_own(waiting))
            waiting = rows
        evaluator.add(_own(waiting))
        own, evaluator = evaluator, self._evaluator()
        for arrays in distributed.iterate_arrays(own.arrays()):
            evaluator.merge(arrays)
        if not evaluator.images:
            raise DataError("data.eval_path: none of its images can be read")
        return evaluator, evaluator.figures(None if counts is None else jax.device_get(counts))

    def _evaluator(self) -> Evaluator:
        return Evaluator(self._batches.count, self._references, self._config.evaluation.kernel_images)

    def examples(self, evaluator: Evaluator, variables: Any, frozen: Any) -> dict[str, list[Example]]:
        """Best, median and worst pictures of a pass, painted again."""
        chosen = evaluator.pick(self._config.evaluation.examples)
        places = np.concatenate(list(chosen.values()))
        indices = evaluator.scores("index")[places]
        # A few pictures: every process reads them all and shows each device its part.
        images = np.stack([self._batches.image(int(i)) for i in indices])
        padded = np.pad(images, ((0, -len(images) % sharding.data_ways(self._mesh)), (0, 0), (0, 0), (0, 0)))
        batch = {"image": padded, "mask": np.ones(len(padded), bool)}
        where = sharding.over_data(self._mesh)
        placed = {n: jax.make_array_from_callback(x.shape, where, x.__getitem__) for n, x in batch.items()}
        painted = jax.device_get(self._paint(variables, frozen, placed))[: len(images)]
        names = [n for n in ("psnr", "ssim", "lpips") if evaluator.has(n)]
        found = [
            Example(int(i), image, reconstruction, {n: float(evaluator.scores(n)[place]) for n in names})
            for i, image, reconstruction, place in zip(indices, images, painted, places, strict=True)
        ]
        return {kind: [found[np.flatnonzero(places == place)[0]] for place in which] for kind, which in chosen.items()}

    def protocol(self, evaluator: Evaluator) -> dict[str, Any]:
        """What has to be known of the figures of a pass to compare them with others."""
        data = self._config.data
        return {
            "data": repr(self._batches),
            "images": evaluator.images,
            "images_unreadable": self._batches.count - evaluator.images,
            "crop": CROPS[data.eval_crop].format(size=data.image_size),
            "pixels": "reconstructions clipped to [0, 1], and rounded to bytes before any network sees them",
            "psnr": "per picture over all pixels and channels, then the mean",
            "ssim": f"Gaussian window {WINDOW}, sigma {SIGMA}, k1 {K1}, k2 {K2}, population variances, per channel",
            "weights": "running mean of the parameters, codebook as it was trained",
            "rfid": "of reconstructions from the same images before they were coded; fid: from the reference",
            "kernel": f"unbiased, (x . y / D + 1)^3, all pairs of the first {self._config.evaluation.kernel_images}",
            "linear_probe": "ridge on 80 % of the images, mean of the quantized latents; accuracy on the others",
            "networks": {n: told | self._told(n) for n, told in self._networks.protocol.items()},
            "model": self._config.model.model_dump(mode="json"),
            "jax": jax.__version__,
            "vqrae_jax": __version__,
            "devices": f"{self._mesh.size} x {self._mesh.devices.flat[0].device_kind}",
        }

    def _told(self, name: str) -> dict[str, Any]:
        if name not in self._widths:
            return {}
        given, used = self._reference(name)[1], None
        if name in self._references:
            used = {"source": given, "images": self._references[name].count, "sha256": self._references[name].digest()}
        return {"features": self._widths[name], "reference": used}

    def _measure(self, task: Any, variables: Any, frozen: Any, params: Any, batch: dict[str, jax.Array]) -> Any:
        seen = dict(task.evaluate_batch(variables, frozen, batch))
        counts, reconstruction = seen.pop("counts", None), seen.pop("reconstruction")
        image = batch["image"].astype(jnp.float32) / 255
        seen |= self._networks.compare(params, reconstruction, image)
        if "linear_probe" not in self._figures:
            seen.pop("code", None)
        return seen | {name: batch[name] for name in ("mask", "index", "label")}, counts

    def _placed(self, number: int, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        (share, shares), local = sharding.data_share(self._mesh), len(batch["mask"])
        index = (number * shares + share) * local + np.arange(local)
        wanted = {name: batch[name] for name in ("image", "mask", "label")}
        return sharding.place_batch(wanted | {"index": index.astype(np.int32)}, self._mesh)

    def _reference(self, name: str) -> tuple[str, str | None]:
        """The field that names the reference of a network, and what it says."""
        return f"evaluation.{name}_reference", getattr(self._config.evaluation, f"{name}_reference")

    def _read_reference(self, name: str) -> None:
        """From an .npz; of a folder, whose images are cropped alike, what `begin` computes it from."""
        field, path = self._reference(name)
        if path is None:
            return
        if not storage.resolve_path(path).is_dir():
            self._references[name] = reference.read(storage.download(path), self._widths[name], field)
            return
        data = self._config.data.model_copy(update={"source": "folder", "eval_path": str(path)})
        share, shares = sharding.data_share(self._mesh)
        try:
            self._folders[name] = pipeline.evaluation_batches(data, process_index=share, process_count=shares)
        except DataError as error:
            raise DataError(str(error).replace("data.eval_path", field)) from None


def _own(rows: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    return {name: sharding.own_rows(x) for name, x in rows.items()}
