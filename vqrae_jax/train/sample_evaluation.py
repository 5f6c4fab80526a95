"""Evaluation of a generator's samples: metrics at one or several settings of the sampler, and their plot."""

import dataclasses
import hashlib
import itertools
import logging
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vqrae_jax import checkpoint, distributed, sharding, storage
from vqrae_jax.build import judges
from vqrae_jax.config import Config
from vqrae_jax.data import images
from vqrae_jax.errors import ConfigError
from vqrae_jax.evaluation import report, visualize
from vqrae_jax.evaluation.evaluator import EvaluationResult, SampleEvaluator
from vqrae_jax.generation.sampler_config import SamplerConfig
from vqrae_jax.inference import samples
from vqrae_jax.inference.generator import Generator
from vqrae_jax.progress import progress

log = logging.getLogger(__name__)

FOLDER = "samples"  # in a workdir: codes of samples, by step and settings
SHOWN = 32  # samples of the picture
# Metrics that improve with quality, variety or both, in the plot of several settings.
PLOTTED = ("fid", "sfid", "inception_score", "precision", "recall", "encoder_fd", "encoder_precision", "encoder_recall")


def sample_metrics(config: Config) -> list[str]:
    """Returns the metrics in evaluation.metrics that compare samples with a reference; empty without their networks."""
    names = [name for name in config.evaluation.metrics if name in (*judges.FEATURES, "sfid", "precision_recall")]
    return names if set(names) & set(judges.FEATURES) else []


def check_compared(config: Config) -> None:
    """Raises ConfigError if settings of the sampler are compared without metrics of samples, or are not its own."""
    if config.evaluation.sampler_steps and config.generator.family == "autoregressive":
        message = "autoregression has as many steps as codes; use ()"
        raise ConfigError(message, field="evaluation.sampler_steps", value=config.evaluation.sampler_steps)
    for name in ("guidances", "sampler_steps"):
        if (values := getattr(config.evaluation, name)) and not sample_metrics(config):
            message = "compares samples, which needs 'inception' or 'encoder' in evaluation.metrics; add one, or use ()"
            raise ConfigError(message, field=f"evaluation.{name}", value=values)


def samplers(config: Config) -> list[SamplerConfig]:
    """Returns the settings to compare: each guidance of evaluation.guidances with each number of sampler_steps."""
    base, evaluation = SamplerConfig(**config.generator.sampler.model_dump()), config.evaluation
    guidances, steps = evaluation.guidances or (base.guidance,), evaluation.sampler_steps or (base.steps,)
    pairs = itertools.product(guidances, steps)
    return [dataclasses.replace(base, guidance=guidance, steps=steps) for guidance, steps in pairs]


def evaluate_samples(
    config: Config, workdir: storage.Path, step: int, mesh: Mesh, result: EvaluationResult | None,
    protocol: dict[str, Any],
) -> dict[str, int | float]:  # fmt: skip
    """Samples images, compares them with the references, and writes a report; returns all metrics.

    Codes of the samples are stored in the workdir: after an interruption, only missing ones are sampled. Every process
    samples its share on its own devices.

    Args:
      config: of the run, complete.
      result: bits per code of validation codes, if there are any, and `protocol` of their evaluation.
    """
    own = sharding.make_mesh(devices=jax.local_devices()) if jax.local_device_count() > 1 else None
    names = sample_metrics(config)
    metrics, warnings = dict(result.metrics) if result else {}, list(result.accumulator.warnings) if result else []
    generator, evaluator = distributed.run_together(lambda: _load(config, workdir, step, own, names, mesh))
    content, pictures = {"protocol": protocol}, {}
    if evaluator is not None:
        rows = []
        for sampler in samplers(config):
            values = _compare(generator, evaluator, workdir / FOLDER, sampler, config, mesh)
            rows.append({"guidance": sampler.guidance, "steps": sampler.steps, **values.metrics})
            warnings += [text for text in values.accumulator.warnings if text not in warnings]
        best = min(rows, key=lambda row: row.get("eval/fid", row.get("eval/encoder_fd", 0.0)))
        metrics |= {name: value for name, value in best.items() if name.startswith("eval/")}
        content["sampler"] = dataclasses.asdict(samplers(config)[rows.index(best)])
        content["samples"] = evaluator.protocol() | {"seed": config.train.seed, "labels": "classes in turn"}
        if len(rows) > 1:
            content["settings"] = rows
            pictures["Settings of the sampler"] = plot_settings(rows)
    if generator.tokenizer is not None and jax.process_index() == 0:
        pictures["Samples"] = _picture(generator, config.train.seed)
    if jax.process_index() == 0:
        source = {"checkpoint": str(workdir / checkpoint.FOLDER / str(step))}
        report.write_sample_report(workdir, step, metrics, warnings, content | source, pictures)
        log.info("wrote %s and %s", workdir / report.EVALUATION_FILE, workdir / report.FOLDER / "index.html")
    return metrics


def _load(
    config: Config, workdir: storage.Path, step: int, own: Mesh | None, names: list[str], mesh: Mesh | None
) -> tuple[Generator, SampleEvaluator | None]:
    generator = Generator.load(workdir, step, tokenizer=config.generator.tokenizer, mesh=own)
    if not names:
        return generator, None
    if generator.tokenizer is None:
        message = "is needed to decode samples for evaluation.metrics"
        raise ConfigError(message, field="generator.tokenizer", value=None)
    data = config.data.model_copy(update={"image_size": generator.tokenizer.image_size})
    for sampler in samplers(config):  # refused before anything is sampled
        generator.choose_sampler(**dataclasses.asdict(sampler))
    return generator, SampleEvaluator(config.evaluation, data, mesh, names, config.evaluation.samples)


def _compare(
    generator: Generator, evaluator: SampleEvaluator, folder: storage.Path, sampler: SamplerConfig, config: Config,
    mesh: Mesh,
) -> EvaluationResult:  # fmt: skip
    seed, count = config.train.seed, config.evaluation.samples
    labels = samples.class_labels(generator.config.classes, count)
    plan = samples.plan_samples(generator, labels, seed, sampler)
    settings = hashlib.sha256(plan.source.encode()).hexdigest()[:8]  # also those that the name lacks
    name = f"{generator.provenance['step']}-guidance{sampler.guidance:g}-steps{sampler.steps}-{count}-{settings}"
    log.info("sampling %d images with guidance %g in %d steps", count, sampler.guidance, sampler.steps)

    def sample() -> None:
        process, processes = distributed.process_index(), distributed.process_count()
        written = samples.write_samples(generator, folder / name, plan, labels, seed, sampler, process, processes)
        for _ in progress(written, count, "samples", lambda number: number * processes):
            pass

    distributed.run_together(sample)
    share, shares = sharding.data_share(mesh)
    batch = config.data.eval_batch_size
    batches = samples.decode_samples(generator, folder / name, batch, share, shares)
    return evaluator.compare(batches, batch // shares)


def plot_settings(rows: list[dict[str, Any]]) -> bytes:
    """Plots the metrics of several settings over the guidance, or over the steps if there is one guidance, as PNG."""
    guidances = sorted({row["guidance"] for row in rows})
    x, line = ("guidance", "steps") if len(guidances) > 1 else ("steps", "guidance")
    panels: dict[str, Any] = {}
    for metric in PLOTTED:
        for value in sorted({row[line] for row in rows}):
            line_rows = sorted((row for row in rows if row[line] == value), key=lambda row: row[x])
            if f"eval/{metric}" in line_rows[0]:
                points = [row[x] for row in line_rows], [row[f"eval/{metric}"] for row in line_rows]
                panels.setdefault(metric, {})[f"{line} {value:g}"] = points
    return visualize.curves(panels, "png", x_label=x)


def _picture(generator: Generator, seed: int) -> bytes:
    classes = generator.config.classes
    labels = np.arange(SHOWN) * max(classes, 1) // SHOWN
    names = [generator.class_name(i) for i in labels.tolist()] if classes else None
    shown = visualize.to_uint8(generator.generate(labels if classes else None, seed, count=SHOWN))
    return images.encode_image(visualize.sample_grid(shown, names), ".png")
