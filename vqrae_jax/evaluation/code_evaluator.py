"""Evaluation of a generator on validation codes."""

from typing import Any

import jax
from jax.sharding import Mesh

from vqrae_jax import sharding
from vqrae_jax.config import Config
from vqrae_jax.data import pipeline
from vqrae_jax.errors import DataError
from vqrae_jax.evaluation.accumulator import Accumulator
from vqrae_jax.evaluation.evaluator import EvaluationResult
from vqrae_jax.evaluation.reference import accumulate


class CodeEvaluator:
    """The compiled program that measures how well a generator predicts codes, or the codes of images."""

    def __init__(self, config: Config, task: Any, mesh: Mesh, batches: pipeline.EvaluationBatches):
        """Uses `evaluate` and `inputs` of `task`, a `train.task.Task`."""
        self._config, self._mesh, self._batches, self._inputs = config, mesh, batches, task.inputs

        def evaluate(variables: Any, frozen: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            return task.evaluate(variables, frozen, batch) | {name: batch[name] for name in ("mask", "index")}

        self._evaluate = jax.jit(evaluate, out_shardings=sharding.over_data(mesh))

    def prepare(self) -> None:
        """Does nothing: there are no references."""

    def listings(self) -> dict[str, Any]:
        """Returns which codes this process has found; processes of one run compare them."""
        return {"data.eval_path": self._batches.listing()}

    def first_images(self) -> dict[str, jax.Array]:
        """Returns the first batch, codes or images."""
        batch = next(iter(self._batches))
        return sharding.place_batch({name: batch[name] for name in self._inputs}, self._mesh)

    def evaluate(self, variables: Any, frozen: Any) -> EvaluationResult:
        """Evaluates a generator on all validation codes."""

        def program(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            return self._evaluate(variables, frozen, batch)

        empty = Accumulator(self._batches.count)
        accumulator = accumulate(program, self._batches, empty, self._mesh, "validation images")
        if not accumulator.images:
            raise DataError("none of the validation images can be read", field="data.eval_path")
        return EvaluationResult({f"eval/{n}": value for n, value in accumulator.metrics().items()}, accumulator)

    def protocol(self, result: EvaluationResult) -> dict[str, Any]:
        """Returns everything that must be known about the metrics to compare them with others."""
        config = self._config.generator
        method = "raster order"
        if config.family == "masked":
            method = "upper bound (Shi et al. 2024, arXiv:2406.04329), estimated at 8 times per image"
        return {
            "data": repr(self._batches),
            "images": result.accumulator.images,
            "bits_per_code": f"mean over images and codes of -log2 p, of the codes' class; {method}",
            "weights": "moving average of the parameters",
            "generator": config.model_dump(mode="json"),
        }
