"""Statistics of the features of a set of images in an .npz with `mu` and `sigma`, as pytorch-fid and ADM write it."""

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vqrae_jax import distributed, sharding, storage
from vqrae_jax.build import judges
from vqrae_jax.data import pipeline
from vqrae_jax.errors import WeightsError
from vqrae_jax.evaluation.moments import Gaussian, Moments
from vqrae_jax.progress import progress


def write_reference(path: pathlib.Path, gaussian: Gaussian, network: Mapping[str, Any]) -> None:
    """Writes `mu` [D], `sigma` [D, D], and `count` and the description of the network, which other readers ignore."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, mu=gaussian.mean, sigma=gaussian.covariance, count=gaussian.count, network=_identity(network))


def read_reference(path: pathlib.Path, width: int, field: str, network: Mapping[str, Any]) -> Gaussian:
    """Reads the statistics of D = `width` features; other arrays (ADM's files hold images too) are not read.

    A file that names another network than `network` is refused, and many files name none. The messages of errors name
    `field`, the config field of the path.
    """

    def error(message: str) -> WeightsError:
        return WeightsError(message, field=field, value=str(path))

    try:
        storage.check_regular(path)
        storage.check_unpacked(path)
        with np.load(path, allow_pickle=False) as file:
            names = file.files
            arrays = {name: np.asarray(file[name]) for name in ("mu", "sigma", "count", "network") if name in names}
    except FileNotFoundError:
        raise error("the file does not exist; expected an .npz or a folder of images") from None
    except Exception as reason:  # numpy, zipfile and zlib raise many kinds for damaged files
        raise error(f"not an .npz of plain arrays ({reason})") from None
    if not {"mu", "sigma"} <= arrays.keys():
        raise error(f"expected the arrays mu and sigma; the file holds {', '.join(names) or 'nothing'}")
    mean, covariance = (np.asarray(arrays[name], np.float64) for name in ("mu", "sigma"))
    if mean.shape != (width,) or covariance.shape != (width, width):
        shapes = f"mu has shape {mean.shape} and sigma {covariance.shape}"
        raise error(f"{shapes}, but this network has {width} features; the file was computed with another network")
    if "network" in arrays and (other := str(arrays["network"])) != (own := _identity(network)):
        raise error(f"the file was computed with the network {other}, not with {own}; compute it again")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise error("mu or sigma is not finite")
    return Gaussian(mean, covariance, int(arrays["count"]) if "count" in arrays else None)


def _identity(network: Mapping[str, Any]) -> str:
    """Returns the description of a network without the place of its weights, which may differ between machines."""
    return json.dumps({name: value for name, value in network.items() if name != "path"}, sort_keys=True)


def compute_feature_moments(
    networks: judges.MetricNetworks, params: Any, batches: pipeline.EvaluationBatches, mesh: Mesh
) -> dict[str, Moments]:
    """Computes the moments of the features of every network over all batches, which are split over the mesh."""
    local: dict[str, Moments] = {}

    @functools.partial(jax.jit, out_shardings=sharding.over_data(mesh))
    def step(params: Any, batch: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array]:
        return networks.features(params, batch["image"].astype(jnp.float32) / 255), batch["mask"]

    for batch in progress(batches, len(batches), "batches of reference images"):
        placed = sharding.place_batch({name: batch[name] for name in ("image", "mask")}, mesh)
        features, mask = jax.tree.map(sharding.own_rows, step(params, placed))
        for name in judges.FEATURES:
            if name in features:
                local.setdefault(name, Moments()).add(features[name][mask])
    total = {name: Moments() for name in local}
    for name, moments in local.items():
        for arrays in distributed.iterate_arrays(moments.arrays()):
            total[name].merge_arrays(arrays)
    return total
