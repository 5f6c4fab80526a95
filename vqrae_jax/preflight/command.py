"""`--mode=preflight`: memory, speed and communication of a config on hardware that this machine does not have."""

import concurrent.futures
import logging
import os
from collections.abc import Callable, Iterator

import jax

from vqrae_jax.config import Config
from vqrae_jax.errors import ConfigError
from vqrae_jax.preflight.alternatives import alternatives, describe_setup
from vqrae_jax.preflight.chips import parse_topology
from vqrae_jax.preflight.devices import abstract_devices
from vqrae_jax.preflight.programs import Cost, Plan, build_mesh
from vqrae_jax.preflight.report import Report

log = logging.getLogger(__name__)

THREADS = 2  # programs compiled at the same time; each needs some GB


def preflight(
    config: Config, topology: str, count: int | None = None, json_path: str | os.PathLike | None = None
) -> Report:
    """Compiles the programs of a run for `topology`, prints their cost and returns it.

    Args:
      config: the run; no data and no weights are read, and the encoders of configs/ need no model hub.
      topology: "v5e:16x16", "gpu:8xh200" or "cpu:8".
      count: number of alternatives to compile, each of which takes as long as the training step; None: 2 if the config
        does not fit, otherwise 0.
      json_path: file for the report as JSON.

    Raises:
      ConfigError: the config or the topology is invalid; raised before anything is compiled.
    """
    target = parse_topology(topology)
    devices = abstract_devices(target)
    plan = Plan.build(config, target, build_mesh(config, devices))
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(_compile, program) for program in plan.programs()]
        fits = futures[0].result().fits
        remaining = (0 if fits else 2) if count is None else count
        others = []
        for other in _alternative_plans(plan, fits, devices):
            if other.argument_bytes() > target.memory:
                others.append((other, None))
            elif remaining:
                remaining -= 1
                others.append((other, pool.submit(_compile, other.train)))
        report = Report(
            target, describe_setup(config, target.size), config.train.steps, [future.result() for future in futures],
            [(describe_setup(p.config, target.size), future and future.result()) for p, future in others],
        )  # fmt: skip
    if json_path:
        report.save(json_path)
    report.print()
    return report


def _alternative_plans(plan: Plan, fits: bool, devices: list[jax.Device]) -> Iterator[Plan]:
    for config in alternatives(plan.config, fits):
        try:
            mesh = build_mesh(config, devices)
        except ConfigError:  # the devices cannot be divided like this
            continue
        yield Plan.build(config, plan.topology, mesh)


def _compile(program: Callable[[], Cost]) -> Cost:
    log.info("compiling %s", program.__name__)
    return program()
