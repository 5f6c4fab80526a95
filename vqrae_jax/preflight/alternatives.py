"""Other ways to run the same config on the same chips: mesh shapes, remat, batch."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from vqrae_jax.config import Config

Changes = dict[str, dict[str, Any]]  # section -> field -> value


@dataclasses.dataclass(frozen=True)
class Way:
    """What a run's speed and memory depend on."""

    slices: int
    data: int
    model: int
    fsdp: bool
    remat: bool
    batch: int
    accumulate: int
    attention: str


def way(config: Config, chips: int) -> Way:
    """How `config` runs on `chips` chips."""
    mesh = config.mesh
    data = chips // (mesh.slices * mesh.model) if mesh.data == -1 else mesh.data
    return Way(
        mesh.slices, data, mesh.model, mesh.fsdp, config.model.remat, config.data.batch_size,
        config.optimizer.accumulate, config.model.attention,
    )  # fmt: skip


def alternatives(config: Config, fits: bool) -> Iterator[Config]:
    """Configs to try, the most promising first: what saves memory, or where there is enough, what may save time."""
    parallel, micro = {"model": 2 * config.mesh.model, "data": -1}, 2 * config.optimizer.accumulate
    remat: Changes = {"model": {"remat": not config.model.remat}}
    fsdp: Changes = {"mesh": {"fsdp": not config.mesh.fsdp}}
    model: Changes = {"mesh": parallel}
    if fits:
        tried = [remat, {"data": {"batch_size": 2 * config.data.batch_size}}, fsdp, model]
    else:
        saving = {} if config.model.remat else {**remat}
        tried = [saving] if saving else []
        tried += [{**saving, **fsdp}] if not config.mesh.fsdp else []
        whole = {**saving, "mesh": {"fsdp": True}}
        tried += [
            {**whole, "optimizer": {"accumulate": micro}},
            {**saving, "mesh": {"fsdp": True, **parallel}},
            {**whole, "data": {"batch_size": config.data.batch_size // 2}},
        ]
    for changes in tried:
        yield config.model_copy(
            update={name: getattr(config, name).model_copy(update=fields) for name, fields in changes.items()}
        )
