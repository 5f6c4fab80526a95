"""Rules of placement: parameters by name, batches by mesh and process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from vqrae_jax import sharding
from vqrae_jax.build.tokenizer import build_tokenizer, variable_shapes
from vqrae_jax.config import ModelConfig, OptimizerConfig
from vqrae_jax.errors import ConfigError
from vqrae_jax.train.optim import make_optimizer


@pytest.fixture(scope="module")
def shapes():
    """Variables of the full-size model of the PyTorch VQRAE."""
    config = ModelConfig(encoder_config_path=None, decoder_config_path="ViT-XL", encoder_params={"architecture": {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 14, "image_size": 518,
    }})  # fmt: skip
    built = build_tokenizer(config)
    assert built.image_size == 256
    return variable_shapes(built)


def test_every_large_leaf_has_a_rule(shapes):
    assert shapes["batch_stats"]["quantizer"]["codebook"].shape == (8192, 768)
    assert sum(x.size for x in jax.tree.leaves(shapes["params"]["decoder"])) > 4e8
    assert sharding.unmatched(shapes, min_size=1024) == []
    assert sharding.unmatched({"new_module": {"weights": jnp.zeros(2048)}}, 1024) == ["new_module/weights"]


def test_optimizer_and_ema_follow_their_parameters(shapes):
    mesh = sharding.make_mesh(4, 2)
    params = shapes["params"]["decoder"]
    state = jax.eval_shape(make_optimizer(OptimizerConfig(), lambda count, horizon: 1e-3).init, params)
    placement = sharding.shardings(params, mesh, fsdp=True)
    for moment in (state[0].mu, state[0].nu):
        assert sharding.shardings(moment, mesh, fsdp=True) == placement


@pytest.mark.parametrize(("path", "shape", "fsdp", "spec"), [
    ("decoder/norms/attn/query/kernel", (1152, 16, 72), False, P(None, "model", None)),
    ("decoder/blocks/attn/query/kernel", (28, 1152, 16, 72), False, P(None, None, "model", None)),
    ("decoder/norms/attn/query/kernel", (1152, 16, 72), True, P("data", "model", None)),
    ("decoder/norms/mlp/down/kernel", (4096, 1152), True, P("model", "data")),
    ("decoder/norms/attn/query/kernel", (1152, 15, 72), False, P(None, None, None)),
    ("quantizer/codebook", (8192, 768), False, P("model", None)),
    ("quantizer/codebook", (8191, 768), False, P(None, None)),
    ("decoder/embed/kernel", (768, 1152), False, P(None, None)),
    ("decoder/embed/kernel", (768, 1152), True, P(None, "data")),
])  # fmt: skip
def test_rules(path, shape, fsdp, spec):
    tree = jax.ShapeDtypeStruct(shape, jnp.float32)
    for name in reversed(path.split("/")):
        tree = {name: tree}
    result = sharding.shardings(tree, sharding.make_mesh(4, 2), fsdp=fsdp)
    assert jax.tree.leaves(result)[0].spec == spec


def test_leaves_that_fsdp_cannot_split():
    mesh, size = sharding.make_mesh(4, 2), 16
    tree = {
        "attn": {"query": {"kernel": np.zeros((6, 2, 3), np.float32)}},  # heads over "model", 4 divides nothing else
        "mlp": {"down": {"kernel": np.zeros((6, 8), np.float32)}},
        "norm": {"scale": np.zeros(7, np.float32)},  # small
        "quantizer": {"codebook": np.zeros((64, 8), np.float32)},  # never split over "data"
    }
    placement = sharding.shardings(tree, mesh, fsdp=True, fsdp_min_size=size)
    placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, placement)
    assert sharding.left_whole(placed, mesh, size) == {"attn/query/kernel": 6 * 1 * 3 * 4}
    assert sharding.left_whole(placed, sharding.make_mesh(1, 8), size) == {}


def test_a_mesh_or_a_batch_that_does_not_fit_the_devices():
    for field, sizes in (("model", {"model": 3}), ("data", {"data": 3, "model": 2}), ("slices", {"slices": 3})):
        with pytest.raises(ConfigError, match=" 8") as error:
            sharding.make_mesh(**sizes)
        assert (error.value.field, error.value.value) == (f"mesh.{field}", 3)
    for batch, accumulate, slices in ((10, 2, 1), (6, 1, 2)):
        with pytest.raises(ConfigError) as error:
            sharding.check_batch(batch, accumulate, sharding.make_mesh(-1, 2, slices=slices), "data.batch_size")
        assert (error.value.field, error.value.value) == ("data.batch_size", batch)


def test_slices_split_batches_and_nothing_else(shapes):
    mesh = sharding.make_mesh(2, 2, slices=2)
    assert mesh.shape == {"slice": 2, "data": 2, "model": 2}
    assert [device.id for device in mesh.devices.flat] == list(range(8))
    assert sharding.over_data(mesh).spec == P(("slice", "data"))
    assert sharding.data_ways(mesh) == 4
    assert sharding.data_share(mesh) == (0, 1)
    for placement in jax.tree.leaves(sharding.shardings(shapes["params"]["decoder"], mesh, fsdp=True)):
        assert "slice" not in str(placement.spec)


class Chip:
    """The attributes of a device that meshes read."""

    platform = device_kind = "chip"

    def __init__(self, number, process_index, slice_index=None):
        self.id, self.process_index = number, process_index
        if slice_index is not None:
            self.slice_index = slice_index


def test_physical_slices_are_not_cut():
    chips = [Chip(i, process_index=i // 2, slice_index=i % 2) for i in range(8)]
    grid = sharding.arrange_slices(chips, 2, 4, 1)
    assert [{chip.slice_index for chip in part.flat} for part in grid] == [{0}, {1}]
    with pytest.raises(ConfigError, match="2 slices") as error:
        sharding.arrange_slices(chips, 4, 2, 1)
    assert error.value.field == "mesh.slices"


def test_model_may_be_a_part_of_an_axis_of_several_physical_slices():
    """Two slices of 4 x 4 chips of v5e, with model=2."""
    chips = [Chip(i, process_index=i // 4, slice_index=i // 16) for i in range(32)]
    for chip in chips:
        chip.platform, chip.device_kind, chip.core_on_chip = "tpu", "TPU v5 lite", 0
        chip.coords = (chip.id % 4, chip.id % 16 // 4, 0)
    grid = sharding.arrange_slices(chips, 2, 8, 2)
    assert [{chip.slice_index for chip in part.flat} for part in grid] == [{0}, {1}]
    assert all(abs(np.subtract(a.coords, b.coords)).sum() == 1 for a, b in grid.reshape(-1, 2))  # neighbors


@pytest.mark.parametrize(
    ("model", "owners", "expected"),
    [
        (1, [0, 0, 1, 1], {0: (0, 2), 1: (1, 2)}),
        (1, [0, 1, 0, 1], {0: (0, 2), 1: (1, 2)}),
        (2, [0, 0, 1, 1], {0: (0, 2), 1: (1, 2)}),
        (4, [0, 0, 1, 1], {0: (0, 1), 1: (0, 1)}),  # both hold halves of every weight, and see the same images
        (2, [0, 1, 2, 3], {0: (0, 2), 1: (0, 2), 3: (1, 2)}),
        (2, [0, 1, 1, 1], {1: None}),
    ],
)
def test_part_of_a_batch_of_a_process(model, owners, expected, monkeypatch):
    """`owners`: the process of each of four devices."""
    chips = np.array([Chip(i, owner) for i, owner in enumerate(owners)])
    mesh = Mesh(chips.reshape(-1, model), ("data", "model"))
    for process, share in expected.items():
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        if share is None:
            with pytest.raises(ConfigError) as error:
                sharding.data_share(mesh)
            assert error.value.field == "mesh.model"
        else:
            assert sharding.data_share(mesh) == share
