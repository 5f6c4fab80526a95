import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from vqrae_jax import sharding
from vqrae_jax.build.tokenizer import build_tokenizer, variable_shapes
from vqrae_jax.config import ModelConfig, OptimizerConfig
from vqrae_jax.errors import ConfigError
from vqrae_jax.train.optim import make_optimizer


@pytest.fixture(scope="module")
def shapes():
    """The origin's full-size model."""
    config = ModelConfig(encoder_config_path=None, decoder_config_path="ViT-XL", encoder_params={"architecture": {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 14, "image_size": 518,
    }})  # fmt: skip
    return variable_shapes(build_tokenizer(config))


def test_every_large_leaf_has_a_rule(shapes):
    assert sharding.unmatched(shapes, min_size=1024) == []
    assert sharding.unmatched({"new_module": {"weights": jnp.zeros(2048)}}, 1024) == ["new_module/weights"]


def test_optimizer_and_ema_follow_their_parameters(shapes):
    mesh = sharding.make_mesh(4, 2)
    params = shapes["params"]["decoder"]
    state = jax.eval_shape(make_optimizer(OptimizerConfig(), 1e-3).init, params)
    where = sharding.shardings(params, mesh, fsdp=True)
    for moment in (state[0].mu, state[0].nu):
        assert sharding.shardings(moment, mesh, fsdp=True) == where


@pytest.mark.parametrize(("path", "shape", "fsdp", "spec"), [
    ("decoder/block00/attn/query/kernel", (1152, 16, 72), False, P(None, "model", None)),
    ("decoder/blocks/attn/query/kernel", (28, 1152, 16, 72), False, P(None, None, "model", None)),
    ("decoder/block00/attn/query/kernel", (1152, 16, 72), True, P("data", "model", None)),
    ("decoder/block00/mlp/down/kernel", (4096, 1152), True, P("model", "data")),
    ("decoder/block00/attn/query/kernel", (1152, 15, 72), False, P(None, None, None)),
    ("quantizer/codebook", (8192, 768), False, P("model", None)),
    ("quantizer/codebook", (8191, 768), False, P(None, None)),
    ("decoder/embed/kernel", (768, 1152), False, P(None, None)),
    ("decoder/embed/kernel", (768, 1152), True, P(None, "data")),
])  # fmt: skip
def test_rules(path, shape, fsdp, spec):
    tree = jax.ShapeDtypeStruct(shape, jnp.float32)
    for name in reversed(path.split("/")):
        tree = {name: tree}
    found = sharding.shardings(tree, sharding.make_mesh(4, 2), fsdp=fsdp)
    assert jax.tree.leaves(found)[0].spec == spec


def test_what_fsdp_cannot_split_is_known():
    mesh, size = sharding.make_mesh(4, 2), 16
    tree = {
        "attn": {"query": {"kernel": np.zeros((6, 2, 3), np.float32)}},  # heads over "model", 4 divides nothing else
        "mlp": {"down": {"kernel": np.zeros((6, 8), np.float32)}},
        "norm": {"scale": np.zeros(7, np.float32)},  # small
        "quantizer": {"codebook": np.zeros((64, 8), np.float32)},  # never split over "data"
    }
    where = sharding.shardings(tree, mesh, fsdp=True, fsdp_min_size=size)
    placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where)
    assert sharding.left_whole(placed, mesh, size) == {"attn/query/kernel": 6 * 1 * 3 * 4}
    assert sharding.left_whole(placed, sharding.make_mesh(1, 8), size) == {}


def test_errors_name_the_field():
    with pytest.raises(ConfigError, match=r"mesh\.model=3 does not divide the 8 devices"):
        sharding.make_mesh(-1, 3)
    with pytest.raises(ConfigError, match="asks for 6 devices, there are 8"):
        sharding.make_mesh(3, 2)
    with pytest.raises(ConfigError, match=r"data\.batch_size=10 is not divisible by 8 .* are 8 and 16"):
        sharding.check_batch(10, 2, sharding.make_mesh(4, 2))


def test_slices_share_batches_and_nothing_else(shapes):
    mesh = sharding.make_mesh(2, 2, slices=2)
    assert mesh.shape == {"slice": 2, "data": 2, "model": 2}
    assert [device.id for device in mesh.devices.flat] == list(range(8))
    assert sharding.over_data(mesh).spec == P(("slice", "data"))
    assert sharding.data_ways(mesh) == 4
    assert sharding.data_share(mesh) == (0, 1)
    for where in jax.tree.leaves(sharding.shardings(shapes["params"]["decoder"], mesh, fsdp=True)):
        assert "slice" not in str(where.spec)
    with pytest.raises(ConfigError, match=r"mesh\.slices=3 x mesh\.model=1 does not divide the 8 devices"):
        sharding.make_mesh(slices=3)
    with pytest.raises(ConfigError, match=r"data\.batch_size=6 .* \(4 devices"):
        sharding.check_batch(6, 1, mesh)


class Chip:
    """A device as far as its place is concerned."""

    platform = device_kind = "chip"

    def __init__(self, number, process_index, slice_index=None):
        self.id, self.process_index = number, process_index
        if slice_index is not None:
            self.slice_index = slice_index


def test_real_slices_are_kept_whole():
    chips = [Chip(i, process_index=i // 2, slice_index=i % 2) for i in range(8)]
    grid = sharding._by_slice(chips, 2, 4, 1)
    assert [{chip.slice_index for chip in part.flat} for part in grid] == [{0}, {1}]
    with pytest.raises(ConfigError, match=r"mesh\.slices=4, but these devices are 2 slices: set mesh\.slices=2"):
        sharding._by_slice(chips, 4, 2, 1)


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
def test_which_part_of_a_batch_a_process_holds(model, owners, expected, monkeypatch):
    """`owners`: the process of each of four devices."""
    chips = np.array([Chip(i, owner) for i, owner in enumerate(owners)])
    mesh = types.SimpleNamespace(
        devices=chips.reshape(-1, model), shape={"data": len(owners) // model, "model": model}, size=len(owners)
    )
    for process, share in expected.items():
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        if share is None:
            with pytest.raises(ConfigError, match=r"mesh\.model=2 cuts the 4 devices across processes"):
                sharding.data_share(mesh)
        else:
            assert sharding.data_share(mesh) == share
