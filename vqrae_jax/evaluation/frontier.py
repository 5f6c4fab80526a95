"""Rate and distortion: the metrics of tokenizers at each number of bits per image, next to JPEG and WebP."""

import bisect
import collections
import concurrent.futures
import functools
import importlib.metadata
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt8

from vqrae_jax import __version__
from vqrae_jax.build.judges import MetricNetworks
from vqrae_jax.data import images as image_files
from vqrae_jax.data.pipeline import EvaluationBatches
from vqrae_jax.errors import DataError
from vqrae_jax.evaluation import visualize
from vqrae_jax.evaluation.accumulator import Accumulator
from vqrae_jax.evaluation.evaluator import CROPS
from vqrae_jax.evaluation.metrics import compare_pixels
from vqrae_jax.progress import progress

CODECS = {  # suffix, qualities and further options of PIL
    "JPEG": (".jpg", range(1, 101), {"optimize": True}),
    "WebP": (".webp", range(101), {"method": 6}),
}
CURVE = (0, 2, 5, 10, 20, 35, 50, 70, 85)  # qualities of a codec's curve, counted from its lowest
THREADS = 4  # that compress images

Images = UInt8[np.ndarray, "B S S 3"]
# Name, kind and value of a point; reconstructions, black if there is no file; and their bits, 0 if there is no file.
Point = tuple[tuple[str, str, float | int], Images, Shaped[np.ndarray, " B"]]


def measure(
    tokenizers: Mapping[str, Any], batches: EvaluationBatches, networks: MetricNetworks, codecs: bool = True
) -> dict[str, Any]:
    """Measures tokenizers and codecs on images that are read once, batch by batch.

    Args:
      tokenizers: `Tokenizer`s with codes, by name, for images of the size of `batches`.
      networks: LPIPS, or none.
      codecs: False: measure the tokenizers only, at their full rates.

    Returns:
      points: a list of {"name": ..., "bits_per_image": ..., metrics}. Those of tokenizers have `length`, that of the
      last axis of the indices. Those of codecs have `quality`, the same for all images; or `limit`, the rate of a
      tokenizer, that no file exceeds: if some images have no such file, only the number of `images` that have one.
      protocol: how all of them were measured.
    """
    rates = {name: list_rates(tokenizer)[0 if codecs else -1 :] for name, tokenizer in tokenizers.items()}
    limits = sorted({bits for pairs in rates.values() for bits, _ in pairs})
    sources = [(functools.partial(reconstruct, n, t, rates[n]), t.module.decoder.patch) for n, t in tokenizers.items()]
    sources += [(functools.partial(compress, name, limits), None) for name in CODECS if codecs]
    points = collections.defaultdict(lambda: Accumulator(1))
    prepare = build_comparison(next(iter(tokenizers.values())), networks)
    for number, batch in enumerate(progress(batches, len(batches), "batches of images")):
        compare, mask = prepare(batch["image"]), batch["mask"]
        index = number * len(mask) + np.arange(len(mask))
        for source, patch in sources:
            for key, decoded, bits in source(batch["image"]):
                rows = {"bits_per_image": bits, "mask": mask & (bits > 0), "index": index}
                points[key].add(rows | compare(decoded, patch))
    count = next(iter(points.values())).images
    if not count:
        raise DataError(f"none of the {batches.count} images can be read", field="data.eval_path")
    values = [
        {"name": name, kind: value} | (point.metrics() if point.images == count else {"images": point.images})
        for (name, kind, value), point in points.items()
    ]
    protocol = {
        "data": repr(batches), "images": count, "images_unreadable": batches.count - count,
        "crop": CROPS["center"].format(size=batch["image"].shape[1]),
        "pixels": "all reconstructions are rounded to 8 bits",
        "bits_per_image": "positions x log2(codebook size) x levels; of codecs, whole files with their headers",
        "feature_distance": "1 - cosine of the tokens of the first tokenizer's encoder, mean over tokens and images",
        "limit": "for each image the largest quality, found by bisection, whose file has at most this number of bits",
        "codecs": {name: options for name, (_, _, options) in CODECS.items()}, "networks": networks.protocol,
        "versions": {"vqrae_jax": __version__, "jax": jax.__version__, "pillow": importlib.metadata.version("pillow")},
    }  # fmt: skip
    return {"points": values, "protocol": protocol}


def list_rates(tokenizer: Any) -> list[tuple[float, int]]:
    """Returns bits per image and length of the last axis of the indices, for all prefixes that decode."""
    *positions, last = tokenizer.code_shape
    lengths = tokenizer.module.quantizer.prefixes or (last,)
    return [(math.prod(positions) * length * math.log2(tokenizer.codebook_size), length) for length in lengths]


def reconstruct(name: str, tokenizer: Any, rates: Sequence[tuple[float, int]], images: Images) -> Iterator[Point]:
    """Yields what a tokenizer makes of images at each of its rates, see `list_rates`."""
    indices = tokenizer.encode_to_indices(images)
    for bits, length in rates:
        decoded = visualize.to_uint8(tokenizer.decode_from_indices(indices[..., :length]))
        yield (name, "length", length), decoded, np.full(len(images), bits)


def compress(codec: str, limits: Sequence[float], images: Images) -> Iterator[Point]:
    """Yields what a codec makes of images at the qualities of CURVE, and at the best ones of at most `limits` bits.

    Sizes increase with the quality, so that bisection finds the largest one.
    """
    suffix, qualities, options = CODECS[codec]

    def encode_all(image: UInt8[np.ndarray, "S S 3"]) -> list[bytes]:
        @functools.cache
        def encode(quality: int) -> bytes:
            return image_files.encode_image(image, suffix, quality=quality, **options)

        fitting = [bisect.bisect_right(qualities, limit, key=lambda q: 8 * len(encode(q))) for limit in limits]
        return [encode(qualities[i]) for i in CURVE] + [encode(qualities[i - 1]) if i else b"" for i in fitting]

    keys = [(codec, "quality", qualities[i]) for i in CURVE] + [(codec, "limit", limit) for limit in limits]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        files = list(pool.map(encode_all, images))
    for key, column in zip(keys, zip(*files, strict=True), strict=True):
        decoded = [image_files.read_image(file) if file else np.zeros_like(images[0]) for file in column]
        yield key, np.stack(decoded), np.array([8 * len(file) for file in column])


def build_comparison(tokenizer: Any, networks: MetricNetworks) -> Callable[[Images], Callable[..., dict[str, Any]]]:
    """Returns a function that prepares images and returns another one, from reconstructions to scores of each image.

    Both are uint8 [B, S, S, 3]; features are those of the tokenizer's encoder. The second argument of the second
    function is the side of the patches of whose borders it returns the `contrast`, or None.
    """

    @jax.jit
    def encode(variables: Any, images: Array) -> Float[Array, "B h w C"]:
        z = tokenizer.module.apply(variables, images, method=lambda model, x: model.encoder(x)).astype(jnp.float32)
        return z / jnp.maximum(jnp.linalg.norm(z, axis=-1, keepdims=True), 1e-12)

    @functools.partial(jax.jit, static_argnames="patch")
    def compare(arguments: Any, y: Array, features: Array, decoded: Array, patch: int | None) -> dict[str, Array]:
        (variables, params), x = arguments, decoded.astype(jnp.float32) / 255
        cosine = (encode(variables, x) * features).sum(-1)
        scores = compare_pixels(x, y, patch) | {"feature_distance": 1 - cosine.mean((1, 2))}
        return scores | networks.compare(params, x, y)

    arguments = tokenizer.variables, jax.device_put(networks.params)

    def prepare(images: Images) -> Callable[..., dict[str, Any]]:
        y = images.astype(np.float32) / 255
        features = encode(tokenizer.variables, y)
        return lambda decoded, patch: jax.device_get(compare(arguments, y, features, decoded, patch))

    return prepare
