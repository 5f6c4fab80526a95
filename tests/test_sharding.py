import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from vqrae_jax import assembly, sharding
from vqrae_jax.config import ModelConfig, OptimizerConfig
from vqrae_jax.train.optim import make_optimizer


@pytest.fixture(scope="module")
def shapes():
    """The origin's full-size model."""
    config = ModelConfig(encoder_config_path=None, decoder_config_path="ViT-XL", encoder_params={"architecture": {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 14, "image_size": 518,
    }})  # fmt: skip
    return assembly.shapes(assembly.assemble(config))


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


def test_errors_name_the_field():
    with pytest.raises(sharding.MeshError, match=r"mesh\.model=3 does not divide the 8 devices"):
        sharding.make_mesh(-1, 3)
    with pytest.raises(sharding.MeshError, match="asks for 6 devices, there are 8"):
        sharding.make_mesh(3, 2)
    with pytest.raises(sharding.MeshError, match=r"data\.batch_size=10 is not divisible by 8 .* are 8 and 16"):
        sharding.check_batch(10, 2, sharding.make_mesh(4, 2))
