import typing

import jax
import jax.numpy as jnp
import pytest

from vqrae_jax import sharding
from vqrae_jax.config import ModelConfig, QuantizerParams
from vqrae_jax.quantizers.factory import QUANTIZERS, create, unread

NAMES = typing.get_args(ModelConfig.model_fields["quantizer"].annotation)


def build(name, channels=12, grid=4, num_embeddings=16, before=False, **params):
    config = ModelConfig(
        quantizer=name, num_embeddings=num_embeddings, quantize_before_reshape=before,
        quantizer_params=QuantizerParams(**params),
    )  # fmt: skip
    return create(config, channels, grid)


def test_the_config_knows_every_quantizer():
    assert set(NAMES) == set(QUANTIZERS)


@pytest.mark.parametrize(
    ("name", "params"), [*((name, {}) for name in NAMES), ("ema", {"codebook_dim": 4, "whitening_dim": 8})]
)
def test_every_name_takes_and_gives_latents(name, params):
    module = build(name, **params)
    shape = jax.ShapeDtypeStruct((2, 4, 4, 12), jnp.float32)
    out, _ = jax.eval_shape(lambda z: module.init_with_output(jax.random.key(0), z), shape)
    assert out.z.shape == shape.shape


@pytest.mark.parametrize("name", NAMES)
def test_the_sharding_table_names_every_leaf(name):
    module = build(name, codebook_dim=None if name in ("lfq", "bsq") else 4, whitening_dim=8)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((2, 4, 4, 12), jnp.float32))
    assert sharding.unmatched({kind: {"quantizer": tree} for kind, tree in shapes.items()}) == []


@pytest.mark.parametrize(
    ("name", "given"), [("residual", {"shared": True, "depth": 3}), ("multiscale", {"grids": (1, 2, 4)})]
)
def test_a_gumbel_quantizer_that_is_shared_anneals_by_steps(name, given):
    steps, z = 2, jnp.ones((2, 4, 4, 12))
    module = build(name, inner="gumbel", temperature=1.0, final_temperature=0.01, anneal_steps=2 * steps, **given)
    variables = module.init(jax.random.key(0), z)
    train = jax.jit(lambda v, key: module.apply(v, z, True, mutable=["batch_stats"], rngs={"codes": key})[1])
    for step in range(steps):
        variables = {**variables, **train(variables, jax.random.key(step))}

    def temperature(bound):
        return (bound.levels[0] if name == "residual" else bound.quantizer)._temperature()

    assert module.apply(variables, method=temperature) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("name", "given", "ignored"),
    [
        ("ema", {"distance": "cosine", "temperature": 0.5, "depth": 8}, ["quantizer_params.depth"]),
        ("fsq", {"num_embeddings": 500, "levels": (4, 4)}, ["num_embeddings"]),
        ("fsq", {"codebook_dim": 8}, ["quantizer_params.codebook_dim"]),
        ("residual", {"depth": 8, "inner": "ibq", "entropy_cost": 0.2, "groups": 3}, ["quantizer_params.groups"]),
        ("residual", {"estimator": "rotation", "legacy": False}, ["quantizer_params.legacy"]),
        ("lfq", {"num_embeddings": 64}, []),
        ("none", {"num_embeddings": 64, "whitening_dim": 8}, ["num_embeddings", "quantizer_params.whitening_dim"]),
    ],
)
def test_what_a_quantizer_does_not_read(name, given, ignored):
    params = {k: v for k, v in given.items() if k in QuantizerParams.model_fields}
    beside = {k: v for k, v in given.items() if k not in params}
    config = ModelConfig(quantizer=name, quantizer_params=QuantizerParams(**params), **beside)
    assert unread(config, 12, 4) == ignored


def test_defaults_are_the_origins_where_it_names_them():
    quantizer = create(ModelConfig(), 768, 16)
    assert (quantizer.num_embeddings, quantizer.commitment_cost) == (8192, 0.25)
    assert (quantizer.decay, quantizer.epsilon) == (0.99, 1e-5)


@pytest.mark.parametrize(
    ("name", "given", "field"),
    [
        ("lfq", {"num_embeddings": 100}, "num_embeddings=100"),
        ("lfq", {"num_embeddings": 2**25}, "num_embeddings=33554432"),
        ("bsq", {"num_embeddings": 1}, "num_embeddings=1"),
        ("bsq", {"codebook_dim": 5}, "codebook_dim=5"),
        ("lfq", {"codebook_dim": 5}, "codebook_dim=5"),
        ("residual", {"codebook_dim": 5, "inner": "lfq"}, "codebook_dim=5"),
        ("product", {"groups": 5}, "groups=5"),
        ("multiscale", {"grids": (1, 2)}, r"grids=\(1, 2\)"),
        ("multiscale", {"grids": (2, 1, 4)}, r"grids=\(2, 1, 4\)"),
        ("multiscale", {"before": True}, "quantize_before_reshape=True"),
        ("fsq", {"adapter": "none"}, "adapter='none'"),
        ("fsq", {"levels": (8,) * 11}, r"levels=.*8589934592 codes"),
        ("ema", {"distance": "dot", "inner": "ibq"}, "distance='dot'"),
        ("residual", {"distance": "dot"}, "distance='dot'"),
        ("ema", {"whitening_dim": 13}, "whitening_dim=13"),
    ],
)
def test_what_does_not_fit_is_named(name, given, field):
    with pytest.raises(ValueError, match=field):
        build(name, **given)
