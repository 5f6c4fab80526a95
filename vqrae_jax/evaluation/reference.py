"""Mean and covariance of a set of pictures' features in a file: .npz with `mu` and `sigma`, as pytorch-fid and ADM."""

import pathlib
import zipfile

import numpy as np

from vqrae_jax.evaluation.moments import Gaussian
from vqrae_jax.pretrained.errors import PretrainedError


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
      PretrainedError: missing, damaged, without the two arrays, or of features of another size.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            given = {name: np.asarray(file[name]) for name in ("mu", "sigma", "count") if name in file.files}
            there = file.files
    except FileNotFoundError:
        raise PretrainedError(f"{field}={str(path)!r} is not there: give an .npz or a folder of images") from None
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise PretrainedError(f"{field}={str(path)!r} is no .npz of plain arrays ({error})") from None
    if not {"mu", "sigma"} <= given.keys():
        raise PretrainedError(f"{field}={str(path)!r} holds {', '.join(there) or 'nothing'}; expected mu and sigma")
    mean, covariance = (np.asarray(given[name], np.float64) for name in ("mu", "sigma"))
    if mean.shape != (width,) or covariance.shape != (width, width):
        raise PretrainedError(
            f"{field}={str(path)!r}: mu has shape {mean.shape} and sigma {covariance.shape}, but the features of this "
            f"network have {width} channels: expected ({width},) and ({width}, {width}); it is of another network"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise PretrainedError(f"{field}={str(path)!r}: mu or sigma is not finite")
    return Gaussian(mean, covariance, int(given["count"]) if "count" in given else None)
