"""The programs of a run, compiled ahead of time for devices that need not exist here, and their cost."""

import collections
import dataclasses
import logging
import math
import pathlib
import re
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from vqrae_jax import runtime, sharding
from vqrae_jax.build import generator as generators
from vqrae_jax.build import weights
from vqrae_jax.build.encoder import replace_encoder, weights_source
from vqrae_jax.config import Config
from vqrae_jax.errors import ConfigError, UserError
from vqrae_jax.generation.network import generate_codes
from vqrae_jax.preflight.chips import Topology, positions
from vqrae_jax.preflight.flops import count_products
from vqrae_jax.preflight.hlo import Collective, Program, mesh_axes
from vqrae_jax.preflight.roofline import Roofline, ScaledSlice, compute_seconds, network_seconds, weak_scaling
from vqrae_jax.pretrained.released import ARCHITECTURES, DINO
from vqrae_jax.pretrained.sources import fetch_folder
from vqrae_jax.train.generator import GeneratorTask
from vqrae_jax.train.task import jit_step
from vqrae_jax.train.tokenizer import TokenizerTask, to_float
from vqrae_jax.train.tokenizer_state import PARTS

log = logging.getLogger(__name__)

ACCELERATOR_TYPES = {"v4": "v4-8", "v5e": "v5litepod-4", "v5p": "v5p-8", "v6e": "v6e-4", "tpu7x": "tpu7x-8"}  # any size


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per device."""

    arguments: float  # parameters, optimizer state, codebook, a batch
    temporaries: float  # the largest total of intermediate arrays
    outputs: float = 0.0  # results that do not reuse the memory of an argument
    code: float = 0.0  # the program itself

    @property
    def peak(self) -> float:
        return self.arguments + self.temporaries + self.outputs + self.code


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one call of a program."""

    name: str
    images: int  # per call, over all devices
    memory: Memory
    fits: bool
    parts: dict[str, float]  # FLOPs by network and pass, over all devices
    collectives: list[tuple[str, str, float, int]]  # kind, mesh axes, bytes over all runs, runs; largest first
    roofline: Roofline | None = None  # None for CPUs, and for a program that the compiler rejects
    slices: list[ScaledSlice] = dataclasses.field(default_factory=list)  # empty unless only the data axis is split
    # FLOPs relative to what the chips can do in bfloat16 in the time of the call, lowest and highest.
    utilization: tuple[float, float] | None = None

    @property
    def flops(self) -> float:
        return sum(self.parts.values())


@dataclasses.dataclass(frozen=True)
class Setup:
    """The settings that decide speed and memory of a run."""

    slices: int
    data: int
    model: int
    fsdp: bool
    remat: bool
    batch: int
    accumulate: int
    dtype: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config on a topology, with the shapes and shardings of all arrays."""

    config: Config
    topology: Topology
    mesh: jax.sharding.Mesh
    task: TokenizerTask | GeneratorTask

    @classmethod
    def build(cls, config: Config, topology: Topology, mesh: jax.sharding.Mesh) -> "Plan":
        """Reads descriptions of networks, but no weights.

        Raises:
          ConfigError: the shape of a generator's codes is not in the config, or they are those of images.
        """
        if config.train.task == "generator":
            if config.data.source != "codes":
                message = "preflight of a generator needs 'codes', as it reads no tokenizer"
                raise ConfigError(message, field="data.source", value=config.data.source)
            return cls(config, topology, mesh, GeneratorTask.build(config, mesh))
        config = _without_files(config)
        weights.fetch_all([item for item in weights.list_weights(config, ()) if _is_description(item)])
        return cls(config, topology, mesh, TokenizerTask.build(config, mesh, weights=False))

    @property
    def setup(self) -> Setup:
        config, axes = self.config, self.mesh.shape
        network = getattr(config, network_section(config))
        return Setup(
            axes.get("slice", 1), axes["data"], axes["model"], config.mesh.fsdp, network.remat,
            config.data.batch_size, config.optimizer.accumulate, network.dtype,
        )  # fmt: skip

    def train_arguments(self) -> tuple[Any, Any, Any, Any]:
        """Returns the shapes of the training step's arguments: state, frozen networks, batch, horizon."""
        horizon = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(self.mesh))
        return self.task.shapes(), self.task.frozen_shapes(), self._batch(self.config.data.batch_size), horizon

    def argument_bytes(self) -> float:
        """Returns the bytes per device of the training step's arguments."""
        return float(sharding.device_bytes(self.train_arguments()))

    def programs(self) -> list[Callable[[], Cost]]:
        """Returns functions that compile each program of the run."""
        if isinstance(self.task, GeneratorTask):
            return [self.compile_train, self.compile_evaluate, self.compile_generate]
        programs = [self.compile_train, self.compile_evaluate, self.compile_tokenize]
        return programs if self.config.model.quantizer != "none" else programs[:2]

    def compile_train(self) -> Cost:
        """Compiles one optimizer step."""
        program = jit_step(self.task, self.mesh)
        return self._compile("train", self.config.data.batch_size, program, *self.train_arguments())

    def compile_evaluate(self) -> Cost:
        """Compiles the evaluation of one batch of validation images."""
        size = self.config.data.eval_batch_size
        batch = {**self._batch(size), "mask": self._shape((size,), jnp.bool), "index": self._shape((size,), jnp.int32)}

        def evaluate(variables: Any, frozen: Any, batch: dict[str, jax.Array]) -> Any:
            metrics = self.task.evaluate(variables, frozen, batch)
            stay_on_devices = ("reconstruction", "code")
            return {name: value for name, value in metrics.items() if name not in stay_on_devices}

        program = jax.jit(evaluate, out_shardings=sharding.replicated(self.mesh))
        variables, frozen = self.task.shapes().inference(), self.task.frozen_shapes()
        return self._compile("evaluate", size, program, variables, frozen, batch)

    def compile_tokenize(self) -> Cost:
        """Compiles the encoding of one batch of validation images to indices, in float32 as `Tokenizer` does it."""
        size = self.config.data.eval_batch_size
        module = self.task.built.module.replace_blocks(dtype="float32", attention="xla")

        def tokenize(variables: Any, frozen: Any, batch: dict[str, jax.Array]) -> jax.Array:
            parts = {n: frozen[n] for n in PARTS if n in frozen}
            variables = {**variables, "params": {**parts, **variables["params"]}}
            return module.apply(variables, to_float(batch["image"]), method="encode_to_indices")

        variables, frozen = self.task.shapes().inference(), self.task.frozen_shapes()
        return self._compile("tokenize", size, jax.jit(tokenize), variables, frozen, self._batch(size))

    def compile_generate(self) -> Cost:
        """Compiles the sampling of a batch of codes, as many as validation images."""
        size, module, sampler = self.config.data.eval_batch_size, self.task.module, self.task.sampler

        def generate(variables: Any, codes: jax.Array, labels: jax.Array) -> jax.Array:
            variables = generators.module_variables(variables)
            return generate_codes(module, variables, self.task.key, codes, labels, sampler)

        batch, variables = self._batch(size), self.task.shapes().inference()
        return self._compile("generate", size, jax.jit(generate), variables, batch["codes"], batch["label"])

    def _batch(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
        if isinstance(self.task, GeneratorTask):
            codes = self._shape((size, self.task.module.config.length), jnp.int32)
            return {"codes": codes, "label": self._shape((size,), jnp.int32)}
        pixels = self.config.data.image_size
        return {"image": self._shape((size, pixels, pixels, 3), jnp.uint8)}

    def _shape(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.over_data(self.mesh))

    def _compile(self, name: str, images: int, program: Any, *arguments: Any) -> Cost:
        traced = program.trace(*arguments)
        products = count_products(traced.jaxpr, self.topology.platform)
        parts: dict[str, float] = collections.defaultdict(float)
        for p in products:
            parts[f"{p.part} backward" if p.backward else p.part] += p.flops
        start = time.monotonic()
        log.info("compiling the program %s for %s", name, self.topology.name)
        try:
            compiled, text = _compile_to_text(traced, self.topology)
        except jax.errors.JaxRuntimeError as error:
            memory = memory_from_error(str(error), self.argument_bytes())
            if memory is None:
                raise
            return Cost(name, images, memory, False, dict(parts), [])
        finally:
            log.info("the compilation of %s took %.0f s", name, time.monotonic() - start)
        stats = compiled.memory_analysis()
        outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
        sizes = stats.argument_size_in_bytes, stats.temp_size_in_bytes, outputs, stats.generated_code_size_in_bytes
        memory, hlo, chip = Memory(*map(float, sizes)), Program(text, self.mesh.size), self.topology.chip
        collectives, fits = hlo.collectives(), memory.peak <= self.topology.memory
        cost = Cost(name, images, memory, fits, dict(parts), self._sum_collectives(collectives))
        if chip is None:
            return cost
        compute = compute_seconds(products, self.mesh.size, chip)
        bounds = Roofline(compute, hlo.memory_traffic() / chip.bandwidth, self._network_seconds(collectives))
        scales = self.mesh.size == self.mesh.shape["data"] > 1
        slices = weak_scaling(collectives, self.topology) if scales else []
        useful = cost.flops / (self.mesh.size * chip.flops)
        utilization = (useful / bounds.slowest, useful / bounds.fastest)
        return dataclasses.replace(cost, roofline=bounds, slices=slices, utilization=utilization)

    def _sum_collectives(self, collectives: list[Collective]) -> list[tuple[str, str, float, int]]:
        sizes, runs = collections.Counter(), collections.Counter()
        for c in collectives:
            key = c.kind, "+".join(mesh_axes(c, dict(self.mesh.shape)))
            sizes[key] += c.size * c.trips
            runs[key] += c.trips
        return [(*key, size, int(runs[key])) for key, size in sizes.most_common()]

    def _network_seconds(self, collectives: list[Collective]) -> float:
        coordinates = positions(self.topology)
        if self.topology.platform == "tpu":
            axes = len(self.topology.shape)  # chips of two-dimensional slices also have a third coordinate
            devices = self.mesh.devices.flat
            coordinates = [(getattr(d, "slice_index", 0), *d.coords[:axes], d.core_on_chip) for d in devices]
        return math.fsum(c.trips * network_seconds(c, self.topology, coordinates) for c in collectives)


def network_section(config: Config) -> str:
    """Returns the section of the config with dtype and remat of the network that trains."""
    return "generator" if config.train.task == "generator" else "model"


def abstract_devices(topology: Topology) -> list[jax.Device]:
    """Returns the devices of a topology. Call it before anything else uses JAX in this process.

    Those of a GPU topology are CPU devices, because XLA compiles for GPUs only on a machine that has one.
    """
    if topology.platform == "tpu":
        if not runtime.has_libtpu():
            message = "needs libtpu: pip install 'vqrae-jax[preflight]', or set TPU_LIBRARY_PATH to libtpu.so"
            raise ConfigError(message, field="--topology", value=topology.name)
        runtime.use_cpus()
        runtime.describe_absent_tpu(ACCELERATOR_TYPES[topology.kind])
        options = {"chip_config_name": "megacore"} if topology.kind == "v4" else {}  # its two cores are one device
        return list(topologies.get_topology_desc(topology.name, "tpu", num_slices=topology.slices, **options).devices)
    runtime.use_cpus(topology.size)
    devices = jax.devices("cpu")[: topology.size]
    if len(devices) < topology.size:
        message = f"JAX has already started in this process with only {len(devices)} CPU devices"
        raise ConfigError(message, field="--topology", value=topology.name)
    return devices


def build_mesh(config: Config, devices: list[jax.Device]) -> jax.sharding.Mesh:
    """Builds the mesh of `config`; raises ConfigError if it or a batch cannot be divided over the devices."""
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.model, devices, config.mesh.slices)
    sharding.check_batch(config.data.batch_size, config.optimizer.accumulate, mesh)
    sharding.check_batch(config.data.eval_batch_size, 1, mesh, "data.eval_batch_size")
    return mesh


def memory_from_error(message: str, arguments: float) -> Memory | None:
    """Reads the memory from the TPU compiler's error about a program that does not fit; None for other errors."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    match = re.search(r"temporaries \(([\d.]+)([KMGT])\)|Used ([\d.]+)([KMGT]) of", message)
    if match is None:
        raise UserError(f"the program needs more memory than a device has; the compiler reports {message[:300]}")
    size = float(match[1] or match[3]) * 1024 ** ("KMGT".index(match[2] or match[4]) + 1)
    return Memory(arguments, size if match[1] else size - arguments)


def _without_files(config: Config) -> Config:
    """Replaces paths of weights, statistics and released encoders by descriptions, so that no file is read."""
    model = config.model.model_copy(update={"pretrained_decoder_path": None, "normalization_stat_path": None})
    if (source := weights_source(model)[0]) in ARCHITECTURES:
        model = replace_encoder(model, None, ARCHITECTURES[source])
    perceptual = config.loss.perceptual
    if perceptual.network == "encoder" and perceptual.path in ARCHITECTURES:
        perceptual = perceptual.model_copy(update={"path": None, "architecture": ARCHITECTURES[perceptual.path]})
    loss = config.loss.model_copy(update={"perceptual": perceptual})
    return config.model_copy(update={"model": model, "loss": loss})


def _is_description(item: weights.Weights) -> bool:
    """Returns whether the files describe a network that is not in `pretrained.released`."""
    return item.fetch is fetch_folder or (item.field == "adversary.path" and item.name not in DINO)


def _compile_to_text(traced: jax.stages.Traced, topology: Topology) -> tuple[jax.stages.Compiled, str]:
    """Returns the compiled program and its text.

    libtpu cannot print compiled programs that use SparseCores (v5p), but can dump every program while it compiles it.
    """
    lowered = traced.lower()
    if topology.platform != "tpu":
        compiled = lowered.compile()
        return compiled, compiled.as_text()
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        (file,) = pathlib.Path(folder).glob("*.after_optimizations.txt")
        return compiled, file.read_text()
