"""Accumulates what was measured of each image, batch by batch, and computes the metrics of all images."""

import collections
import logging
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int, Shaped

from vqrae_jax import distributed
from vqrae_jax.evaluation import codebook_health, distances
from vqrae_jax.evaluation.moments import Gaussian, Moments

log = logging.getLogger(__name__)

# One number per image.
SCORES = ("psnr", "ssim", "lpips", "feature_distance", "bits_per_image", "bits_per_code", "token_accuracy")
SPLIT = 5_000  # images per split of the Inception score
LIMITS = {"image": 10_000, "reconstruction": 50_000}  # features that precision and recall compare
DISTANCES = {"inception": ("", "fid"), "spatial": ("", "sfid")}  # prefix and name; others: ("NETWORK_", "fd")

Rows = Mapping[str, np.ndarray]


class Accumulator:
    """Metrics over images that arrive in batches of any size and order, in one or several processes.

    Of each image only scores and pooled latents are stored, and features if its index is below `kernel_images`; for
    precision and recall those of up to 10,000 images and 50,000 reconstructions (Inception: 490 MB in each process).
    `metrics` adds to `warnings`, sentences about metrics that cannot be computed or compared.

    Args:
      count: approximate number of images to come; it sets the number of splits of the Inception score.
      references: by network, the feature statistics of other images than those that were reconstructed.
      manifolds: by network, features of such images for precision and recall; None: neither is computed.
      ordered: images are samples with classes in turn or at random: the Inception score is of successive ones, and
        precision and recall are of the first.
    """

    def __init__(
        self, count: int, references: Mapping[str, Gaussian] | None = None, kernel_images: int = 5_000,
        manifolds: Mapping[str, Float[np.ndarray, "n D"]] | None = None, ordered: bool = False,
    ):  # fmt: skip
        self.warnings: list[str] = []
        self._settings = count, references, kernel_images, manifolds, ordered
        self.count, self._kernel_images = count, kernel_images
        self._references, self._manifolds, self._ordered = references or {}, manifolds, ordered
        self._stored: dict[str, list[np.ndarray]] = {}
        self.moments: dict[str, Moments] = collections.defaultdict(Moments)  # of features, by NETWORK/side
        splits = {"splits": -(-count // SPLIT), "block": SPLIT} if ordered else {"splits": max(count // SPLIT, 1)}
        self._score = distances.InceptionScore(**splits)

    def add(self, rows: Rows) -> None:
        """Adds a batch of arrays [B, ...].

        They are `mask` (False: padding, ignored), `index` in the dataset, and any of SCORES, `contrast`
        (`metrics.border_contrast` of reconstruction and image, [B, 2, 2]), `NETWORK/image` and `NETWORK/reconstruction`
        (features), `scores/reconstruction` (Inception's class scores), `code` (pooled quantized latents) and `label`.
        Generated samples are reconstructions without images.
        """
        mask = np.asarray(rows["mask"], bool)
        rows = {name: np.asarray(values)[mask] for name, values in rows.items()}
        for name in (*SCORES, "contrast", "index", "code", "label"):
            if name in rows:
                self._store(name, rows[name])
        if "scores/reconstruction" in rows:
            self._score.add(rows.pop("scores/reconstruction"), rows["index"])
        for side in [name for name in rows if "/" in name]:
            self.moments[side].add(rows[side])
            if not side.startswith("spatial/"):
                self._store(side, rows[side][rows["index"] < self._kernel_images])
                if self._manifolds is not None:
                    limit, index = LIMITS[side.rpartition("/")[2]], np.int64(rows["index"])
                    if not self._ordered:  # evenly spaced, as datasets are ordered by class
                        index = index * limit % self.count
                    self._store(f"compared {side}", rows[side][index < limit])
        for network in [name.removesuffix("/image") for name in rows if name.endswith("/image")]:
            if network != "spatial" and (reconstruction := f"{network}/reconstruction") in rows:
                a, b = (rows[side].astype(np.float64) for side in (f"{network}/image", reconstruction))
                lengths = np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-30)
                self._store(f"{network}_cosine", 1 - (a * b).sum(1) / lengths)

    def _store(self, name: str, values: np.ndarray) -> None:
        self._stored.setdefault(name, []).append(values)

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the state as arrays, for `merge_arrays` in another process."""
        parts = {"stored": {name: np.concatenate(parts) for name, parts in self._stored.items()}}
        parts |= {f"moments {side}": moments.arrays() for side, moments in self.moments.items()}
        parts["score"] = self._score.arrays()
        return {f"{part}:{name}": values for part, arrays in parts.items() for name, values in arrays.items()}

    def merge_arrays(self, arrays: Rows) -> None:
        parts: dict[str, dict[str, np.ndarray]] = {}
        for path, values in arrays.items():
            part, name = path.split(":")
            parts.setdefault(part, {})[name] = values
        self._score.merge_arrays(parts.pop("score"))
        for name, values in parts.pop("stored", {}).items():
            self._store(name, values)
        for part, values in parts.items():
            self.moments[part.removeprefix("moments ")].merge_arrays(values)

    def gather(self) -> "Accumulator":
        """Returns an accumulator of the images of all processes, all of which call this."""
        total = Accumulator(*self._settings)
        for arrays in distributed.iterate_arrays(self.arrays()):
            total.merge_arrays(arrays)
        return total

    @property
    def images(self) -> int:
        return sum(map(len, self._stored.get("index", [])))

    def compared(self, side: str) -> Float[np.ndarray, "n D"] | None:
        """Returns the features that precision and recall use, if they are computed."""
        return np.concatenate(self._stored[f"compared {side}"]) if f"compared {side}" in self._stored else None

    def metrics(self, counts: Int[np.ndarray, "*levels K"] | None = None) -> dict[str, int | float]:
        """Computes all metrics of `report.DESCRIPTIONS`, those of the codebook from how often each index was chosen."""
        values = {name: float(self.scores(name).mean(dtype=np.float64)) for name in SCORES if self.has_scores(name)}
        values["images"] = self.images
        if "contrast" in self._stored:
            values |= self._seams()
        for side in self.moments:
            if side.endswith("/reconstruction"):
                values |= self._distances(side.removesuffix("/reconstruction"))
        if self._score.count:
            values["inception_score"], values["inception_score_deviation"] = self._score.result()
        if "code" in self._stored:
            values |= self._probe()
        if counts is not None:
            health = codebook_health.health(counts)
            tokens = float(counts.sum(dtype=np.int64)) / self.images
            values |= {f"codebook_{name}": value for name, value in health.items()}
            values["bits_per_image"] = tokens * float(np.log2(counts.shape[-1]))
            values["entropy_bits_per_image"] = tokens * health["entropy_bits"]
        return values

    def has_scores(self, name: str) -> bool:
        return name in self._stored

    def scores(self, name: str) -> Shaped[np.ndarray, "n ..."]:
        """Returns psnr, ssim, lpips, contrast, index, code or label of each image, in the order of the dataset."""
        return np.concatenate(self._stored[name])[np.argsort(np.concatenate(self._stored["index"]))]

    def select_examples(self, count: int) -> dict[str, Int[np.ndarray, " n"]]:
        """Returns positions of up to `count` best, median and worst images by LPIPS, or by PSNR without it."""
        error = self.scores("lpips") if self.has_scores("lpips") else -self.scores("psnr")
        order = np.argsort(error, kind="stable")
        count = min(count, len(order))
        middle = (len(order) - count) // 2
        return {"best": order[:count], "median": order[middle : middle + count], "worst": order[len(order) - count :]}

    def _seams(self) -> dict[str, float]:
        (border, inside), (image_border, image_inside) = self.scores("contrast").sum(0, dtype=np.float64).tolist()
        if not inside * image_border:
            self._warn(
                "seams: needs images with differences across patch borders, and reconstructions with some inside"
            )
            return {}
        return {"seams": border * image_inside / (inside * image_border)}

    def _distances(self, network: str) -> dict[str, int | float]:
        prefix, distance = DISTANCES.get(network, (f"{network}_", "fd"))
        (image, reconstruction), cosine = (f"{network}/{side}" for side in LIMITS), f"{network}_cosine"
        values = {cosine: float(self.scores(cosine).mean())} if self.has_scores(cosine) else {}
        if self.images < 2:
            self._warn(f"{network}: distances between distributions need at least two images")
            return values
        gaussian = self.moments[reconstruction].gaussian()
        self._check_rank(network, "images", gaussian)
        if image in self.moments:
            values[f"{prefix}r{distance}"] = distances.frechet_distance(self.moments[image].gaussian(), gaussian)
        if network in self._references:
            self._check_rank(network, "reference images", self._references[network])
            values[f"{prefix}{distance}"] = distances.frechet_distance(self._references[network], gaussian)
        if cosine in values:
            pair = (np.concatenate(self._stored[side]) for side in (image, reconstruction))
            values[f"{network}_kernel"] = distances.kernel_distance(*pair)
        for mark, manifold in (("r", self.compared(image)), ("", (self._manifolds or {}).get(network))):
            if manifold is None:
                continue
            if self.images <= distances.NEIGHBORS:
                self._warn(f"{network}: precision and recall need at least {distances.NEIGHBORS + 1} images")
                break
            pair = distances.precision_recall(manifold, self.compared(reconstruction))
            values[f"{prefix}{mark}precision"], values[f"{prefix}{mark}recall"] = pair
        return values

    def _check_rank(self, network: str, source: str, gaussian: Gaussian) -> None:
        if gaussian.count is not None and gaussian.count < len(gaussian.mean):
            self._warn(
                f"{network}: the {gaussian.count} {source} are fewer than the {len(gaussian.mean)} features, so the "
                "Frechet distance is too large and comparable only for this number; the kernel distance is unbiased"
            )

    def _probe(self) -> dict[str, int | float]:
        features, labels = self.scores("code"), self.scores("label")
        labelled = labels >= 0
        classes, counts = np.unique(labels[labelled], return_counts=True)
        if (counts >= 2).sum() < 2:
            self._warn(
                "linear probe: needs two classes with two images each (class folders or labels); of the "
                f"{len(classes)} classes of the {self.images} images {(counts >= 2).sum()} have as many"
            )
            return {}
        probe = distances.linear_probe(features[labelled], labels[labelled])
        return {f"probe_{name}": value for name, value in probe.items()}

    def _warn(self, text: str) -> None:
        log.warning("%s", text)
        self.warnings.append(text)
