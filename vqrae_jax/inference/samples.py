"""Many samples of a generator as a dataset of codes, which several processes write and any of them continues."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Int, UInt8

from vqrae_jax import storage
from vqrae_jax.data import codes
from vqrae_jax.data.code_shards import Columns
from vqrae_jax.errors import DataError
from vqrae_jax.evaluation import visualize
from vqrae_jax.generation.sampler_config import SamplerConfig
from vqrae_jax.inference.generator import Generator

SHARD = 1024  # samples

OnShard = Callable[[range, Int[np.ndarray, "n ..."], Int[np.ndarray, " n"]], None]


def plan_samples(
    generator: Generator, labels: Int[np.ndarray, " N"], seed: int, sampler: SamplerConfig, format: str = "npz"
) -> codes.Plan:
    """Returns the description of a dataset of samples, which has everything that decides their codes."""
    settings = {
        "seed": seed,
        **dataclasses.asdict(sampler),
        "labels": hashlib.sha256(labels.tobytes()).hexdigest()[:16],
    }
    provenance = {name: generator.provenance.get(name) for name in ("step", "version")}
    tokenizer, config = generator.tokenizer, generator.config
    return codes.Plan(
        tokenizer=config.tokenizer_hash or tokenizer.hash,
        source=f"samples {json.dumps(provenance | settings)}",
        images=len(labels),
        views="one",
        code_shape=generator.code_shape,
        code_dtype="uint16" if config.num_embeddings <= 1 << 16 else "int32",
        codebook_size=config.num_embeddings,
        image_size=1 if tokenizer is None else tokenizer.image_size,
        format=format,
        shard_size=min(SHARD, len(labels)),
        classes=None if generator.classes is None else tuple(generator.classes),
        grids=config.grids,
    )


def write_samples(
    generator: Generator, folder: storage.Path, plan: codes.Plan, labels: Int[np.ndarray, " N"], seed: int,
    sampler: SamplerConfig, process: int = 0, processes: int = 1, on_shard: OnShard = lambda *_: None,
) -> Iterator[int]:  # fmt: skip
    """Samples and writes the shards that are missing, every `processes`-th one; yields the number of new samples.

    `on_shard` is called before a shard is complete with the numbers of its samples, their codes and labels, so that
    what it writes exists for every shard. The last process completes the manifest.
    """
    for shard in [shard for shard in codes.start_dataset(folder, plan) if shard % processes == process]:
        rows = range(*plan.image_range(shard))
        own = labels[rows.start : rows.stop]
        parts = []
        for part in generator.stream_codes(own, seed, sampler, rows.start):
            parts.append(part)
            yield len(part)
        sampled = np.concatenate(parts)
        on_shard(rows, sampled, own)
        stored = np.where(own < generator.config.classes, own, -1).astype(np.int32)
        columns = Columns(np.asarray(rows), [f"{i:08d}" for i in rows], stored, sampled.astype(plan.code_dtype))
        codes.write_shard(folder, plan, shard, columns)
    codes.finish_dataset(folder, plan)


def decode_samples(
    generator: Generator, folder: storage.Path, batch: int, share: int = 0, shares: int = 1
) -> Iterator[UInt8[np.ndarray, "b S S 3"]]:
    """Yields the images of a dataset in order, this process's share of batches of `batch`.

    Part i of n of a batch is its images [i * batch / n, (i + 1) * batch / n). Of the last batch it may be smaller, or
    empty: every share has as many parts.
    """
    dataset, size = codes.Codes(folder, cached=2), batch // shares
    if dataset.plan.tokenizer != generator.tokenizer.hash:
        raise DataError("has codes of another tokenizer than the generator", field="samples", value=str(folder))
    for start in range(share * size, len(dataset) + share * size, batch):
        rows = [dataset[i]["codes"] for i in range(start, min(start + size, len(dataset)))]
        indices = np.stack(rows) if rows else np.zeros((0, *generator.code_shape), np.int32)
        yield visualize.to_uint8(generator.tokenizer.decode_from_indices(indices))


def class_labels(classes: int, count: int) -> Int[np.ndarray, " N"]:
    """Returns labels with equally many samples of each class, classes in turn; without classes all are 0."""
    return (np.arange(count) % max(classes, 1)).astype(np.int32)
