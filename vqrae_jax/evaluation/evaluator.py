"""Gathers what was measured of each picture, batch by batch, and gives the figures of all of them."""

import logging
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

from vqrae_jax.evaluation import codebook_health as codebook
from vqrae_jax.evaluation.frechet import frechet_distance
from vqrae_jax.evaluation.inception_score import InceptionScore
from vqrae_jax.evaluation.kernel_distance import kernel_distance
from vqrae_jax.evaluation.moments import Gaussian, Moments
from vqrae_jax.evaluation.probe import linear_probe

log = logging.getLogger(__name__)

SCORES = ("psnr", "ssim", "lpips")  # one number per picture
SPLIT = 5_000  # pictures per split of the Inception score

Rows = Mapping[str, np.ndarray]


class Evaluator:
    """Figures over pictures that come in batches of any size and any order, in one place or several.

    What is kept grows with the number of pictures only by their scores, their pooled codes for the linear probe, and
    features of the first `kernel_images`; no picture is kept.
    """

    def __init__(self, count: int, references: Mapping[str, Gaussian] | None = None, kernel_images: int = 5_000):
        """
        Args:
          count: pictures that will come, about; it sets the splits of the Inception score.
          references: by network, statistics of other pictures than the ones that were painted.
          kernel_images: the kernel distance looks at the pictures whose numbers are below it.
        """
        self.remarks: list[str] = []
        self._references, self._kernel_images = references or {}, kernel_images
        self._kept: dict[str, list[np.ndarray]] = {}
        self._moments: dict[str, Moments] = {}
        self._score = InceptionScore(max(count // SPLIT, 1))

    def add(self, rows: Rows) -> None:
        """Takes in a batch.

        Args:
          rows: arrays [B, ...]: `mask`, which pictures are real; `index`, their numbers in the dataset; and any of
            psnr, ssim, lpips, `NETWORK/image` and `NETWORK/reconstruction` (features), `scores/reconstruction` (of
            Inception's classes), `code` (pooled quantized features) and `label`.
        """
        real = np.asarray(rows["mask"], bool)
        rows = {name: np.asarray(values)[real] for name, values in rows.items()}
        for name in (*SCORES, "index", "code", "label"):
            if name in rows:
                self._keep(name, rows[name])
        if "scores/reconstruction" in rows:
            self._score.add(rows.pop("scores/reconstruction"), rows["index"])
        for name in [name for name in rows if name.endswith("/reconstruction")]:
            self._add_features(name.removesuffix("/reconstruction"), rows)

    def _add_features(self, network: str, rows: Rows) -> None:
        sides = [f"{network}/image", f"{network}/reconstruction"]
        for side in sides:
            self._moments.setdefault(side, Moments()).add(rows[side])
            self._keep(side, rows[side][rows["index"] < self._kernel_images])
        a, b = (rows[side].astype(np.float64) for side in sides)
        lengths = np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-30)
        self._keep(f"{network}_cosine", 1 - (a * b).sum(1) / lengths)

    def _keep(self, name: str, values: np.ndarray) -> None:
        self._kept.setdefault(name, []).append(values)

    def arrays(self) -> dict[str, np.ndarray]:
        """All that was taken in, for `merge` in another process."""
        parts = {"kept": {name: np.concatenate(parts) for name, parts in self._kept.items()}}
        parts |= {f"moments {side}": moments.arrays() for side, moments in self._moments.items()}
        parts["score"] = self._score.arrays()
        return {f"{part}:{name}": values for part, arrays in parts.items() for name, values in arrays.items()}

    def merge(self, arrays: Rows) -> None:
        """Takes in what another has, whose pictures are others of the same dataset."""
        parts: dict[str, dict[str, np.ndarray]] = {}
        for path, values in arrays.items():
            part, name = path.split(":")
            parts.setdefault(part, {})[name] = values
        self._score.merge(parts.pop("score"))
        for name, values in parts.pop("kept", {}).items():
            self._keep(name, values)
        for part, values in parts.items():
            self._moments.setdefault(part.removeprefix("moments "), Moments()).merge_arrays(values)

    @property
    def images(self) -> int:
        """How many were taken in."""
        return sum(map(len, self._kept.get("index", [])))

    def figures(self, counts: Int[np.ndarray, "*levels K"] | None = None) -> dict[str, float]:
        """All figures; `counts`, how often each code was chosen, adds those of the codebook.

        psnr in dB, ssim, lpips: means over the pictures. rfid, fid (Inception), encoder_rfd, encoder_fd: Frechet
        distances from the same pictures before they were coded, and from the reference. ..._kernel: the kernel
        distance from the pictures themselves. ..._cosine: mean over pictures of 1 - cosine(features of picture,
        features of its reconstruction). inception_score and its deviation. probe_accuracy and probe_chance, see
        `probe`. bits_per_image as codes of equal length, entropy_bits_per_image as an ideal code of each code's share.
        """
        values = {name: float(self.scores(name).mean(dtype=np.float64)) for name in SCORES if name in self._kept}
        values["images"] = self.images
        for side in self._moments:
            if side.endswith("/image"):
                values |= self._distances(side.removesuffix("/image"))
        if self._score.count:
            values["inception_score"], values["inception_score_deviation"] = self._score.result()
        if "code" in self._kept:
            values |= self._probe()
        if counts is not None:
            values |= self._codes(counts)
        return values

    def has(self, name: str) -> bool:
        """Whether the pictures came with this score."""
        return name in self._kept

    def scores(self, name: str) -> Float[np.ndarray, " n"]:
        """psnr, ssim, lpips or index of the pictures seen, in the order of the dataset."""
        return self._in_order(name)

    def pick(self, count: int) -> dict[str, Int[np.ndarray, " n"]]:
        """Positions in `scores` of the best, median and worst pictures by LPIPS, or else PSNR; best first in each."""
        badness = self.scores("lpips") if "lpips" in self._kept else -self.scores("psnr")
        order = np.argsort(badness, kind="stable")
        count = min(count, len(order))
        middle = (len(order) - count) // 2
        return {"best": order[:count], "median": order[middle : middle + count], "worst": order[len(order) - count :]}

    def _distances(self, network: str) -> dict[str, float]:
        prefix, distance = ("", "fid") if network == "inception" else (f"{network}_", "fd")
        values = {f"{network}_cosine": float(self._in_order(f"{network}_cosine").mean())}
        if self.images < 2:
            self._remark(f"{network}: one picture has no distribution; its distances are not measured")
            return values
        image, painted = (self._moments[f"{network}/{side}"].gaussian() for side in ("image", "reconstruction"))
        self._check_rank(network, "the validation images", image)
        values[f"{prefix}r{distance}"] = frechet_distance(image, painted)
        if network in self._references:
            self._check_rank(network, "the reference", self._references[network])
            values[f"{prefix}{distance}"] = frechet_distance(self._references[network], painted)
        kept = (np.concatenate(self._kept[f"{network}/{side}"]) for side in ("image", "reconstruction"))
        values[f"{network}_kernel"] = kernel_distance(*kept)
        return values

    def _check_rank(self, network: str, what: str, gaussian: Gaussian) -> None:
        if gaussian.count is not None and gaussian.count < len(gaussian.mean):
            self._remark(
                f"{network}: {what} are {gaussian.count} pictures, fewer than the {len(gaussian.mean)} dimensions of "
                f"the features: a Frechet distance of so few is far too large and compares only with one of the same "
                f"number; {network}_kernel has no such bias"
            )

    def _probe(self) -> dict[str, float]:
        features, labels = self._in_order("code"), self._in_order("label")
        known = labels >= 0
        classes, counts = np.unique(labels[known], return_counts=True)
        if len(classes) < 2 or counts.max() < 2:
            self._remark(
                f"linear probe: the {self.images} pictures have {len(classes)} classes and at most "
                f"{counts.max(initial=0)} pictures of one; it needs two of each, from folders of classes or labels"
            )
            return {}
        return {f"probe_{name}": value for name, value in linear_probe(features[known], labels[known]).items()}

    def _codes(self, counts: Int[np.ndarray, "*levels K"]) -> dict[str, float]:
        health = codebook.health(counts)
        codes = float(counts.sum(dtype=np.int64)) / self.images
        return {f"codebook_{name}": value for name, value in health.items()} | {
            "bits_per_image": codes * float(np.log2(counts.shape[-1])),
            "entropy_bits_per_image": codes * health["entropy_bits"],
        }

    def _in_order(self, name: str) -> np.ndarray:
        """What was kept of every picture, however the pictures came."""
        return np.concatenate(self._kept[name])[np.argsort(np.concatenate(self._kept["index"]))]

    def _remark(self, text: str) -> None:
        log.warning("%s", text)
        self.remarks.append(text)
