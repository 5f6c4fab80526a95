"""`--mode=preflight`: memory, speed and communication of a config on hardware that this machine does not have."""

import concurrent.futures
import logging
import os
from collections.abc import Iterator
from typing import Any

import jax

from vqrae_jax.config import Config
from vqrae_jax.errors import ConfigError
from vqrae_jax.preflight.advice import describe_float32, describe_images, float32_fields, in_bfloat16
from vqrae_jax.preflight.chips import parse_topology
from vqrae_jax.preflight.programs import Plan, abstract_devices, build_mesh, network_section
from vqrae_jax.preflight.report import Report

log = logging.getLogger(__name__)

THREADS = 2  # programs compiled at the same time; each needs some GB


def preflight(
    config: Config, topology: str, count: int | None = None, json_path: str | os.PathLike | None = None
) -> Report:
    """Compiles the programs of a run for `topology`, prints their cost and returns it.

    No data and no weights are read, and the encoders of configs/ need no model hub.

    Args:
      topology: "v5e:16x16" (of each of mesh.slices), "gpu:8xh200" or "cpu:8".
      count: number of alternatives to compile, each of which takes as long as the training step; None: 2 if the config
        does not fit, 1 if it fits and its networks run in float32 on TPUs or GPUs, otherwise 0.
      json_path: file for the report as JSON.
    """
    target = parse_topology(topology, config.mesh.slices)
    devices = abstract_devices(target)
    plan = Plan.build(config, target, build_mesh(config, devices))
    log.info("compiling for %s, which takes minutes for large models", topology)
    if float32 := describe_float32(config, target):
        log.warning("%s", float32)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(program) for program in plan.programs()]
        fits = futures[0].result().fits
        remaining = (int(bool(float32)) if fits else 2) if count is None else count
        compiled = []
        for other in _alternative_plans(plan, fits, devices):
            if other.argument_bytes() > target.memory:
                compiled.append((other, None))
            elif remaining:
                remaining -= 1
                compiled.append((other, pool.submit(other.compile_train)))
        programs = [future.result() for future in futures]
        report = Report(
            target, plan.setup, config.train.steps, programs,
            [(other.setup, future and future.result()) for other, future in compiled],
            list(filter(None, [float32, describe_images(programs[0], target)])),
        )  # fmt: skip
    if json_path:
        report.save(json_path)
    report.print()
    return report


def alternatives(config: Config, fits: bool) -> Iterator[Config]:
    """Yields configs to try, the most promising first: faster ones if `config` fits, otherwise smaller ones.

    The first has all networks in bfloat16, if they are not, and so have the others.
    """
    if float32_fields(config):
        config = in_bfloat16(config)
        yield config
    section = network_section(config)
    recomputes = getattr(config, section).remat
    remat: dict[str, Any] = {section: {"remat": not recomputes}}
    fsdp: dict[str, Any] = {"mesh": {"fsdp": not config.mesh.fsdp}}
    wider: dict[str, Any] = {"model": 2 * config.mesh.model, "data": -1}
    if fits:
        changes = [remat, {"data": {"batch_size": 2 * config.data.batch_size}}, fsdp, {"mesh": wider}]
    else:
        saving = {} if recomputes else remat
        sharded = {**saving, "mesh": {"fsdp": True}}
        changes = [
            *([saving] if saving else []),
            *([{**saving, **fsdp}] if not config.mesh.fsdp else []),
            {**sharded, "optimizer": {"accumulate": 2 * config.optimizer.accumulate}},
            {**saving, "mesh": {"fsdp": True, **wider}},
            {**sharded, "data": {"batch_size": config.data.batch_size // 2}},
        ]
    for sections in changes:
        yield config.model_copy(
            update={name: getattr(config, name).model_copy(update=fields) for name, fields in sections.items()}
        )


def _alternative_plans(plan: Plan, fits: bool, devices: list[jax.Device]) -> Iterator[Plan]:
    for config in alternatives(plan.config, fits):
        try:
            mesh = build_mesh(config, devices)
        except ConfigError:  # the devices cannot be divided like this
            continue
        yield Plan.build(config, plan.topology, mesh)
