"""Mean and covariance of a set of pictures' features in a file: .npz with `mu` and `sigma`, as pytorch-fid and ADM."""

import functools
import pathlib
import zipfile
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vqrae_jax import distributed, sharding
from vqrae_jax.build import judges
from vqrae_jax.errors import WeightsError
from vqrae_jax.evaluation.moments import Gaussian, Moments


def write(path: pathlib.Path, gaussian: Gaussian) -> None:
    """`count` is written beside `mu` [D] and `sigma` [D, D]; other readers do not ask for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, mu=gaussian.mean, sigma=gaussian.covariance, count=gaussian.count)


def read(path: pathlib.Path, width: int, field: str) -> Gaussian:
    """The file's statistics.

    Args:
      path: .npz; other arrays in it (ADM's has pictures too) are not read.
      width: D of the features that they will be compared with.
      field: the config field that named it, for messages.

    Raises:
      WeightsError: missing, damaged, without the two arrays, or of features of another size.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            given = {name: np.asarray(file[name]) for name in ("mu", "sigma", "count") if name in file.files}
            there = file.files
    except FileNotFoundError:
        raise WeightsError(f"{field}={str(path)!r} is not there: give an .npz or a folder of images") from None
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{field}={str(path)!r} is no .npz of plain arrays ({error})") from None
    if not {"mu", "sigma"} <= given.keys():
        raise WeightsError(f"{field}={str(path)!r} holds {', '.join(there) or 'nothing'}; expected mu and sigma")
    mean, covariance = (np.asarray(given[name], np.float64) for name in ("mu", "sigma"))
    if mean.shape != (width,) or covariance.shape != (width, width):
        raise WeightsError(
            f"{field}={str(path)!r}: mu has shape {mean.shape} and sigma {covariance.shape}, but the features of this "
            f"network have {width} channels: expected ({width},) and ({width}, {width}); it is of another network"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise WeightsError(f"{field}={str(path)!r}: mu or sigma is not finite")
    return Gaussian(mean, covariance, int(given["count"]) if "count" in given else None)


def feature_moments(
    nets: judges.MetricNetworks, params: Any, batches: Iterable[dict[str, Any]], mesh: Mesh
) -> dict[str, Moments]:
    """Moments of the features of every network in `nets`, over batches as `pipeline.evaluation_batches` gives them.

    Each batch is spread over the mesh; each process adds up the features of its own rows, and is told the sums of all.
    """
    own: dict[str, Moments] = {}

    @functools.partial(jax.jit, out_shardings=sharding.over_data(mesh))
    def step(params: Any, batch: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array]:
        return nets.features(params, batch["image"].astype(jnp.float32) / 255), batch["mask"]

    for batch in batches:
        placed = sharding.place_batch({name: batch[name] for name in ("image", "mask")}, mesh)
        features, mask = jax.tree.map(sharding.own_rows, step(params, placed))
        for name in judges.FEATURES:
            if name in features:
                own.setdefault(name, Moments()).add(features[name][mask])
    return {name: _of_all_processes(moments) for name, moments in own.items()}


def _of_all_processes(own: Moments) -> Moments:
    moments = Moments()
    for arrays in distributed.iterate_arrays(own.arrays()):
        moments.merge_arrays(arrays)
    return moments
