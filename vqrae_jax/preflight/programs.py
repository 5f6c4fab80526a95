"""The programs of a run, compiled ahead of time for devices that need not be there, and what they cost."""

import dataclasses
import pathlib
import re
import tempfile
from typing import Any

import jax
import jax.numpy as jnp

from vqrae_jax import sharding
from vqrae_jax.config import Config, LossConfig, ModelConfig
from vqrae_jax.errors import UserError
from vqrae_jax.preflight import flops, hlo, padding, roofline, scaling
from vqrae_jax.preflight.chips import Topology, positions
from vqrae_jax.pretrained.released import ARCHITECTURES
from vqrae_jax.train.task import step_program
from vqrae_jax.train.tokenizer import PARTS, TokenizerTask, to_float


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per device.

    Attributes:
      arguments: what the program is given: parameters, optimizer, codebook, a batch.
      temporaries: the most that it needs beside, at one time.
      outputs: results that do not replace an argument.
      code: the program itself.
    """

    arguments: float
    temporaries: float
    outputs: float = 0.0
    code: float = 0.0

    @property
    def peak(self) -> float:
        return self.arguments + self.temporaries + self.outputs + self.code


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one call of a program costs.

    Attributes:
      images: of one call, over all devices.
      collectives: (kind, mesh axes, bytes over all trips, how many run), largest first.
      roofline: None on a CPU, and where the program does not fit.
      slices: the same on slices of other sizes; empty where anything but the data axis is split.
      waste: the share of a TPU's multiplications that is padding.
      utilization: FLOPs of all passes relative to what the chips could do in the time, (at worst, at best).
      products: the large ones on a TPU, each with its share of the FLOPs.
    """

    name: str
    images: int
    memory: Memory
    fits: bool
    flops: float
    parts: dict[str, float]
    collectives: list[tuple[str, str, float, int]]
    roofline: roofline.Roofline | None
    slices: list[scaling.Size] = dataclasses.field(default_factory=list)
    waste: float = 0.0
    utilization: tuple[float, float] | None = None
    products: list[tuple[float, padding.Product]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config on a topology, in shapes only."""

    config: Config
    topology: Topology
    mesh: jax.sharding.Mesh
    task: TokenizerTask

    @classmethod
    def make(cls, config: Config, topology: Topology, devices: list[jax.Device]) -> "Plan":
        """Reads descriptions, no weights, and checks that batch, mesh and devices fit together."""
        mesh = sharding.make_mesh(config.mesh.data, config.mesh.model, devices, config.mesh.slices)
        sharding.check_batch(config.data.batch_size, config.optimizer.accumulate, mesh)
        sharding.check_batch(config.data.eval_batch_size, 1, mesh, "data.eval_batch_size")
        config = config.model_copy(update={"model": _without_files(config.model), "loss": _without_file(config.loss)})
        return cls(config, topology, mesh, TokenizerTask.build(config, mesh, weights=False))

    def train_arguments(self) -> tuple[Any, Any, Any]:
        """What a training step is given, as shapes: state, frozen networks, batch."""
        return self.task.shapes(), self.task.frozen_shapes(), self._images(self.config.data.batch_size)

    def arguments(self) -> float:
        """Bytes per device of what a training step is given."""
        return float(sharding.device_bytes(self.train_arguments()))

    def train(self) -> Cost:
        """One optimizer step."""
        return self._cost(
            "train", self.config.data.batch_size, step_program(self.task, self.mesh), *self.train_arguments()
        )

    def evaluate(self) -> Cost:
        """One batch of validation images."""
        size = self.config.data.eval_batch_size
        variables, frozen = self.task.shapes().inference(), self.task.frozen_shapes()
        batch = {**self._images(size), "mask": self._shape((size,), jnp.bool)}

        def evaluate(variables: Any, frozen: Any, batch: dict[str, jax.Array]) -> Any:
            seen = self.task.evaluate_batch(variables, frozen, batch)
            return {n: value for n, value in seen.items() if n not in ("reconstruction", "code")}  # stay on the devices

        program = jax.jit(evaluate, out_shardings=sharding.replicated(self.mesh))
        return self._cost("evaluate", size, program, variables, frozen, batch)

    def tokenize(self) -> Cost:
        """Codes of one batch of validation images."""
        size = self.config.data.eval_batch_size
        variables, frozen = self.task.shapes().inference(), self.task.frozen_shapes()

        def tokenize(variables: Any, frozen: Any, batch: dict[str, jax.Array]) -> jax.Array:
            parts = {n: frozen[n] for n in PARTS if n in frozen}
            variables = {**variables, "params": {**parts, **variables["params"]}}
            image = to_float(batch["image"])
            return self.task.built.module.apply(variables, image, method="encode_to_indices")

        return self._cost("tokenize", size, jax.jit(tokenize), variables, frozen, self._images(size))

    def programs(self) -> list[Any]:
        """What this config runs, as functions without arguments."""
        tokenizes = self.config.model.quantizer != "none"
        return [self.train, self.evaluate, *([self.tokenize] if tokenizes else [])]

    def _images(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
        pixels = self.config.data.image_size
        return {"image": self._shape((size, pixels, pixels, 3), jnp.uint8)}

    def _shape(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.over_data(self.mesh))

    def _cost(self, name: str, images: int, program: Any, *arguments: Any) -> Cost:
        traced = program.trace(*arguments)
        products = flops.count(traced.jaxpr, self.topology.platform)
        parts: dict[str, float] = {}
        for p in products:
            part = f"{p.part} backward" if p.backward else p.part
            parts[part] = parts.get(part, 0.0) + p.flops
        total = sum(parts.values())
        try:
            compiled, text = compile_and_print(traced, self.topology)
        except jax.errors.JaxRuntimeError as error:
            memory = _from_error(str(error), self.arguments())
            if memory is None:
                raise
            return Cost(name, images, memory, False, total, parts, [], None)
        stats = compiled.memory_analysis()
        memory = Memory(
            stats.argument_size_in_bytes,
            stats.temp_size_in_bytes,
            stats.output_size_in_bytes - stats.alias_size_in_bytes,
            stats.generated_code_size_in_bytes,
        )
        program = hlo.Program(text, self.mesh.size)
        collectives, line, sizes, beside, used, tiled = program.collectives(), None, [], 0.0, None, []
        if chip := self.topology.chip:
            if chip.side:
                tiled = padding.products(program, chip.side)
                beside = padding.total(tiled, chip.passes["highest"])
            compute = flops.seconds(products, self.mesh.size, chip.flops, chip.passes)
            memory_time = program.memory_traffic() / chip.bandwidth
            line = roofline.Roofline(compute * (1 + beside), memory_time, self._network(collectives))
            used = (compute / line.slowest, compute / line.fastest)
            if self.mesh.size == self.mesh.shape["data"] > 1:
                sizes = scaling.sizes(collectives, self.topology)
        fits = memory.peak <= self.topology.memory
        return Cost(
            name, images, memory, fits, total, parts, self._communication(collectives), line, sizes,
            beside / (1 + beside), used, padding.large(tiled),
        )  # fmt: skip

    def _communication(self, collectives: list[hlo.Collective]) -> list[tuple[str, str, float, int]]:
        sums: dict[tuple[str, str], list[float]] = {}
        for c in collectives:
            row = sums.setdefault((c.kind, "+".join(hlo.axes(c, dict(self.mesh.shape)))), [0.0, 0])
            row[0] += c.size * c.trips
            row[1] += c.trips
        rows = [(kind, axes, size, int(runs)) for (kind, axes), (size, runs) in sums.items()]
        return sorted(rows, key=lambda row: -row[2])

    def _network(self, collectives: list[hlo.Collective]) -> float:
        where = self._positions()
        return sum(c.trips * roofline.network_seconds(c, self.topology, where) for c in collectives)

    def _positions(self) -> list[roofline.Position]:
        if self.topology.platform != "tpu":
            return positions(self.topology)
        flat = len(self.topology.shape)  # chips have three coordinates on two-dimensional slices as well
        return [tuple(d.coords[:flat]) for d in self.mesh.devices.flat]


def _without_files(model: ModelConfig) -> ModelConfig:
    """The same model by descriptions: no weights, and of the encoders that we know no config.json either."""
    params = model.encoder_params
    source = params.dinov2_path or params.dinov3_path or params.model_name or model.encoder_config_path
    changes: dict[str, Any] = {"pretrained_decoder_path": None, "normalization_stat_path": None}
    if source in ARCHITECTURES:
        nothing = dict.fromkeys(("dinov2_path", "dinov3_path", "model_name"))
        changes["encoder_config_path"] = None
        changes["encoder_params"] = params.model_copy(update={**nothing, "architecture": ARCHITECTURES[source]})
    return model.model_copy(update=changes)


def _without_file(loss: LossConfig) -> LossConfig:
    """The same losses; a perceptual encoder that we know by its description."""
    wanted = loss.perceptual
    if wanted.network != "encoder" or wanted.path not in ARCHITECTURES:
        return loss
    described = wanted.model_copy(update={"path": None, "architecture": ARCHITECTURES[wanted.path]})
    return loss.model_copy(update={"perceptual": described})


def _from_error(message: str, arguments: float) -> Memory | None:
    """What the compiler of a TPU says when a program does not fit; None for other errors."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = re.search(r"temporaries \(([\d.]+)([KMGT])\)|Used ([\d.]+)([KMGT]) of", message)
    if found is None:
        raise UserError(f"the program does not fit, and the compiler does not say by how much: {message[:300]}")
    size = float(found[1] or found[3]) * 1024 ** ("KMGT".index(found[2] or found[4]) + 1)
    return Memory(arguments, size if found[1] else size - arguments)


def compile_and_print(traced: jax.stages.Traced, topology: Topology) -> tuple[jax.stages.Compiled, str]:
    """The compiled program and its text.

    libtpu prints every program while it compiles; of a compiled one it cannot where SparseCores are used (v5p).
    """
    lowered = traced.lower()
    if topology.platform != "tpu":
        compiled = lowered.compile()
        return compiled, compiled.as_text()
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        (file,) = pathlib.Path(folder).glob("*.after_optimizations.txt")
        return compiled, file.read_text()
