"""`--mode=preflight`: does a config fit a pod, how fast can it be, what would be better; on a machine without any."""

import concurrent.futures
import logging
import os
from typing import Any

from vqrae_jax.config import Config
from vqrae_jax.errors import ConfigError
from vqrae_jax.preflight.alternatives import alternatives, way
from vqrae_jax.preflight.chips import parse
from vqrae_jax.preflight.devices import abstract_devices
from vqrae_jax.preflight.programs import Cost, Plan
from vqrae_jax.preflight.report import Report

log = logging.getLogger(__name__)

WORKERS = 2  # programs compiled at the same time; each takes some GB


def preflight(
    config: Config, topology: str, others: int | None = None, json_path: str | os.PathLike | None = None
) -> Report:
    """Compiles what a run of `config` would run on `topology`, prints what it costs, and returns it.

    Args:
      config: of the run; neither data nor weights are read, and encoders of our configs need no hub.
      topology: "v5e:16x16", "gpu:8xh200", "cpu:8".
      others: how many alternatives to compile, each of which takes as long again; None: none where the config fits,
        else two.
      json_path: also written there.

    Raises:
      ConfigError, ConfigError: before anything is compiled.
    """
    target = parse(topology)
    devices = abstract_devices(target)
    plan = Plan.make(config, target, devices)
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        started = [pool.submit(_compiled, program) for program in plan.programs()]
        train = started[0].result()
        others = (0 if train.fits else 2) if others is None else others
        rest = []
        for other in _plans(plan, train.fits, devices):
            if other.arguments() > target.memory:
                rest.append((other, None))
            elif others:
                others -= 1
                rest.append((other, pool.submit(_compiled, other.train)))
        report = Report(
            topology, target.size, target.memory, target.platform == "gpu", way(config, target.size),
            config.train.steps, [s.result() for s in started],
            [(way(p.config, target.size), done and done.result()) for p, done in rest],
        )  # fmt: skip
    if json_path:
        report.save(json_path)
    report.print()
    return report


def _plans(plan: Plan, fits: bool, devices: list[Any]) -> list[Plan]:
    found = []
    for config in alternatives(plan.config, fits):
        try:
            found.append(Plan.make(config, plan.topology, devices))
        except ConfigError:  # that many devices or images cannot be split so
            continue
    return found


def _compiled(program: Any) -> Cost:
    log.info("compiling %s", program.__name__)
    return program()
