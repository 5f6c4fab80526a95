"""References that results are compared with: folders of images, or .npz files as ADM and pytorch-fid write them.

The arrays of a file are `mu` and `sigma`, the statistics of features; for sFID `mu_s` and `sigma_s`, those of
Inception's spatial features; for precision and recall `arr_0`, images.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from vqrae_jax import __version__, sharding, storage
from vqrae_jax.build import judges
from vqrae_jax.config import DataConfig, EvaluationConfig, Metric
from vqrae_jax.data import pipeline
from vqrae_jax.errors import DataError, WeightsError
from vqrae_jax.evaluation.accumulator import LIMITS, Accumulator
from vqrae_jax.evaluation.distances import NEIGHBORS
from vqrae_jax.evaluation.moments import Gaussian
from vqrae_jax.progress import progress

STATISTICS = {"inception": ("mu", "sigma"), "encoder": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # in files
Rows = dict[str, np.ndarray]
Program = Callable[[dict[str, jax.Array]], dict[str, jax.Array]]


class References:
    """Statistics and features of the images that results are compared with, by network.

    The constructor reads files and waits for no other process; call `prepare` before the first comparison.

    Attributes:
      params: those of the networks, on the devices of the mesh.
      gaussians: statistics by the names of `MetricNetworks.widths`.
      manifolds: for precision and recall, features [n, D] by network; None if `metrics` does not contain them.
      needed: smallest number of images on each side.
    """

    def __init__(
        self, config: EvaluationConfig, data: DataConfig, networks: judges.MetricNetworks, mesh: Mesh,
        metrics: Collection[Metric],
    ):  # fmt: skip
        """Reads the files, and lists the images of folders, which are cropped as validation images."""
        self._config, self._data, self._networks, self._mesh = config, data, networks, mesh
        self.params = jax.tree.map(lambda x: sharding.place_array(x, sharding.replicated(mesh)), networks.params)
        self.gaussians: dict[str, Gaussian] = {}
        self.manifolds: dict[str, np.ndarray] | None = {} if "precision_recall" in metrics else None
        self.needed = 2 if self.manifolds is None else NEIGHBORS + 1
        self._images: dict[str, tuple[Iterable[Rows], int]] = {}  # for `prepare`: batches, number of images
        self._digests: dict[str, str] = {}  # SHA-256 of files
        self._widths = networks.widths()
        for name in judges.FEATURES:
            if name in self._widths and self.setting(name)[1] is not None:
                self._read(name)

    def setting(self, name: str) -> tuple[str, str | None]:
        return f"evaluation.{name}_reference", getattr(self._config, f"{name}_reference")

    def _read(self, name: str) -> None:
        field, path = self.setting(name)
        share, shares = sharding.data_share(self._mesh)
        if storage.resolve_path(path).is_dir():
            data = self._data.model_copy(update={"source": "folder", "eval_path": str(path)})
            try:
                batches = pipeline.evaluation_batches(data, process_index=share, process_count=shares)
            except DataError as error:
                raise error.renamed({"data.eval_path": field}) from None
            self._images[name] = batches, batches.count
            return
        file, with_images = storage.download(path), self.manifolds is not None
        widths = {n: width for n, width in self._widths.items() if (n == "encoder") == (name == "encoder")}
        gaussians, images = read_reference(file, widths, field, self._networks.protocol[name], with_images)
        self.gaussians |= gaussians
        self._digests[name] = storage.hash_file(file)
        if images is not None:
            self._check_count(name, len(images))
            size = self._data.eval_batch_size // shares
            starts = range(share * size, len(images) + share * size, shares * size)
            self._images[name] = pad_batches((images[i : i + size] for i in starts), size), len(images)

    def prepare(self) -> None:
        """Computes the features of reference images, at the first call; every process reads its share of them."""
        computed = self.gaussians if self.manifolds is None else self.manifolds
        for name in [name for name in self._images if name not in computed]:
            batches, count = self._images[name]
            networks = dataclasses.replace(self._networks, modules={name: self._networks.modules[name]})
            program = feature_program(networks, self.params, self._mesh, "image")
            empty = Accumulator(count, kernel_images=0, manifolds=self.manifolds)
            total = accumulate(program, batches, empty, self._mesh, "reference images")
            self._check_count(name, total.images)
            for features in networks.widths():
                self.gaussians.setdefault(features, total.moments[f"{features}/image"].gaussian())
            if self.manifolds is not None:
                self.manifolds[name] = total.compared(f"{name}/image")

    def _check_count(self, name: str, count: int) -> None:
        if count < self.needed:
            field, path = self.setting(name)
            raise DataError(f"has {count} images; expected at least {self.needed}", field=field, value=path)

    def listings(self) -> dict[str, Any]:
        """Returns, by config field, which images of folders this process has found; the processes of a run compare."""
        folders = {n: b for n, (b, _) in self._images.items() if isinstance(b, pipeline.EvaluationBatches)}
        return {self.setting(name)[0]: batches.listing() for name, batches in folders.items()}

    def protocol(self) -> dict[str, Any]:
        """Returns the part of an evaluation's protocol that describes networks, references and software."""
        limits = (
            f"up to {LIMITS['image']} images and {LIMITS['reconstruction']} others, evenly spaced (samples: the first)"
        )
        return {
            "sfid": "Inception's mixed_6/conv:0, 7 channels at 17 x 17 positions",
            "precision_recall": f"{NEIGHBORS} neighbors; {limits}",
            "networks": {name: fields | self._describe(name) for name, fields in self._networks.protocol.items()},
            "jax": jax.__version__,
            "vqrae_jax": __version__,
            "devices": f"{self._mesh.size} x {self._mesh.devices.flat[0].device_kind}",
        }

    def _describe(self, name: str) -> dict[str, Any]:
        if name not in self._widths:
            return {}
        statistics = None
        if gaussian := self.gaussians.get(name):
            sha256 = self._digests.get(name) or gaussian.digest()
            statistics = {"source": self.setting(name)[1], "images": gaussian.count, "sha256": sha256}
        return {"features": self._widths[name], "reference": statistics}


def write_reference(path: pathlib.Path, gaussians: Mapping[str, Gaussian], network: Mapping[str, Any]) -> None:
    """Writes the statistics of a network's features, and `count` and its description, which other readers ignore."""
    arrays = {"network": _identity(network)}
    for name, gaussian in gaussians.items():
        arrays |= dict(zip((*STATISTICS[name], "count"), gaussian, strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)


def read_reference(
    path: pathlib.Path, widths: Mapping[str, int], field: str, network: Mapping[str, Any], with_images: bool = False
) -> tuple[dict[str, Gaussian], UInt8[np.ndarray, "N H W 3"] | None]:
    """Reads the statistics of features, whose numbers `widths` names, and the images only if `with_images`.

    A file that names another network than `network` is refused, and many files name none. The messages of errors name
    `field`, the config field of the path.
    """

    def error(message: str) -> WeightsError:
        return WeightsError(message, field=field, value=str(path))

    pairs = {name: STATISTICS[name] for name in widths}
    expected = [name for pair in pairs.values() for name in pair] + ["arr_0"] * with_images
    try:
        storage.check_regular(path)
        storage.check_unpacked(path)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in file.files if name in (*expected, "count", "network")}
            names = ", ".join(file.files) or "nothing"
        count = int(arrays["count"]) if "count" in arrays else None
        finite = {name for name, x in arrays.items() if name not in ("network", "arr_0") and np.isfinite(x).all()}
    except FileNotFoundError:
        raise error("the file does not exist; expected an .npz or a folder of images") from None
    except Exception as reason:  # numpy, zipfile and zlib raise many kinds for damaged files
        raise error(f"not an .npz of plain arrays ({reason})") from None
    if not arrays.keys() >= set(expected):
        raise error(f"expected the arrays {', '.join(expected)}; the file holds {names}")
    if "network" in arrays and (other := str(arrays["network"])) != (own := _identity(network)):
        raise error(f"the file was computed with the network {other}, not with {own}; compute it again")
    images, gaussians = arrays.get("arr_0"), {}
    if images is not None and (images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3):
        raise error(f"arr_0 is {images.dtype} {list(images.shape)}; expected uint8 [N, H, W, 3]")
    for name, (mu, sigma) in pairs.items():
        mean, covariance, width = arrays[mu], arrays[sigma], widths[name]
        if mean.shape != (width,) or covariance.shape != (width, width):
            shapes = f"{mu} has shape {mean.shape} and {sigma} {covariance.shape}"
            raise error(f"{shapes}, but this network has {width} features; the file was computed with another network")
        if not finite >= {mu, sigma} or np.abs(covariance - covariance.T).max() > 1e-5 * np.abs(covariance).max():
            raise error(f"{mu} or {sigma} is not finite, or {sigma} is not symmetric")
        gaussians[name] = Gaussian(mean.astype(np.float64), covariance.astype(np.float64), count)
    return gaussians, images


def _identity(network: Mapping[str, Any]) -> str:
    """Returns the description of a network without the place of its weights, which may differ between machines."""
    return json.dumps({name: value for name, value in network.items() if name != "path"}, sort_keys=True)


def feature_program(networks: judges.MetricNetworks, params: Any, mesh: Mesh, side: str) -> Program:
    """Returns the compiled program from a batch of images, which are `side` = "image" or "reconstruction", to rows."""

    @functools.partial(jax.jit, out_shardings=sharding.over_data(mesh))
    def extract(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        rows = networks.features(params, batch["image"].astype(jnp.float32) / 255)
        rows = {f"{name}/{side}": x for name, x in rows.items() if (name, side) != ("scores", "image")}
        return rows | {name: batch[name] for name in ("mask", "index")}

    return functools.partial(extract, params)


def accumulate(program: Program, batches: Iterable[Rows], local: Accumulator, mesh: Mesh, unit: str) -> Accumulator:
    """Adds the rows that a program returns for the images of this process to `local`; returns those of all processes.

    Batches are {"image": uint8 [b, H, W, 3], "mask": bool [b], ...}, this process's part of as many global batches in
    every process. The program also receives the `index` of each image; those from `local.count` on are masked. `unit`
    is the name of the images, for the progress.
    """
    share, shares = sharding.data_share(mesh)

    def run_batches() -> Iterator[dict[str, jax.Array]]:
        counted = progress(batches, local.count, unit, lambda batch: shares * len(batch["mask"]))
        for number, batch in enumerate(counted):
            size = len(batch["mask"])
            index = ((number * shares + share) * size + np.arange(size)).astype(np.int32)
            mask = batch["mask"] & (index < local.count)
            yield program(sharding.place_batch(batch | {"index": index, "mask": mask}, mesh))

    for rows, _ in itertools.pairwise(itertools.chain(run_batches(), [None])):  # the device works on the next batch
        local.add(jax.tree.map(sharding.own_rows, rows))
    return local.gather()


def pad_batches(batches: Iterable[np.ndarray], size: int | None = None) -> Iterator[Rows]:
    """Yields images uint8 [_, H, W, 3] with a mask, padded to batches of `size`; None: that of the first batch."""
    for images in batches:
        size = len(images) if size is None else size
        if images.dtype != np.uint8 or images.ndim != 4 or len(images) > size:
            raise DataError(f"images are {images.dtype} {list(images.shape)}; expected uint8 [at most {size}, H, W, 3]")
        yield {"image": np.pad(images, [(0, size - len(images)), *[(0, 0)] * 3]), "mask": np.arange(size) < len(images)}
