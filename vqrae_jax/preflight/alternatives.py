"""Other setups of the same config on the same chips: mesh shape, recomputation, batch size."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from vqrae_jax.config import Config


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


def describe_setup(config: Config, chips: int) -> Setup:
    """Returns the setup of `config` on a number of chips."""
    mesh = config.mesh
    data = chips // (mesh.slices * mesh.model) if mesh.data == -1 else mesh.data
    return Setup(
        mesh.slices, data, mesh.model, mesh.fsdp, config.model.remat, config.data.batch_size,
        config.optimizer.accumulate,
    )  # fmt: skip


def alternatives(config: Config, fits: bool) -> Iterator[Config]:
    """Yields configs to try, the most promising first: faster ones if `config` fits, otherwise smaller ones."""
    remat: dict[str, Any] = {"model": {"remat": not config.model.remat}}
    fsdp: dict[str, Any] = {"mesh": {"fsdp": not config.mesh.fsdp}}
    wider: dict[str, Any] = {"model": 2 * config.mesh.model, "data": -1}
    if fits:
        changes = [remat, {"data": {"batch_size": 2 * config.data.batch_size}}, fsdp, {"mesh": wider}]
    else:
        saving = {} if config.model.remat else remat
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
