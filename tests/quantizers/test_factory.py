import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax import quantizers as q
from vqrae_jax.config import ModelConfig, QuantizerParams, from_dict
from vqrae_jax.errors import ConfigError
from vqrae_jax.quantizers.factory import create, unread
from vqrae_jax.quantizers.registry import QUANTIZERS, all_settings, settings_of


def build(name, num_embeddings=16, before=False, **params):
    fields = {"num_embeddings": num_embeddings, "quantize_before_reshape": before}
    return create(ModelConfig(quantizer=name, quantizer_params=QuantizerParams(**params), **fields), 12, 4)


def test_the_config_has_every_quantizer_and_setting():
    assert set(typing.get_args(ModelConfig.model_fields["quantizer"].annotation)) == set(QUANTIZERS)
    params = {f"quantizer_params.{name}" for name in QuantizerParams.model_fields}
    assert set(all_settings()) <= params | set(ModelConfig.model_fields)


def test_the_package_exports_every_class_with_the_names_of_the_config():
    assert {entry.module.__name__ for entry in QUANTIZERS.values()} <= vars(q).keys()
    for entry in QUANTIZERS.values():
        names = {name: setting.path.rpartition(".")[2] for name, setting in settings_of(entry.module).items()}
        assert {name for name in names if name != names[name]} <= {"quantizer"}  # the config has its name as `inner`


def test_classes_and_the_config_have_the_same_defaults():
    ema, bits = q.EMAQuantizer(8192, 12), q.LFQ(8192)
    modules = {
        "ema": ema, "simvq": q.SimVQ(8192, 12), "ibq": q.IBQ(8192, 12), "gumbel": q.GumbelQuantizer(8192, 12),
        "fsq": q.FSQ((8, 5, 5, 5), 12), "lfq": q.Projected(bits, 12), "residual": q.Residual(ema),
        "bsq": q.Projected(bits.clone(spherical=True), 12), "product": q.Product(ema.clone(channels=6)),
        "multiscale": q.MultiScale(ema, (1, 2, 3, 4)), "none": q.NoQuantizer(), "vq": q.VQ(8192, 12),
    }  # fmt: skip
    assert {name: create(ModelConfig(quantizer=name), 12, 4) for name in QUANTIZERS} == modules


def test_defaults_and_limits_of_the_settings():
    """Flags and saved configs of earlier versions stay valid; the quantizer is that of the PyTorch VQRAE."""
    ema = create(ModelConfig(), 768, 16)
    assert (ema.num_embeddings, ema.commitment_cost, ema.vq_decay, ema.vq_epsilon) == (8192, 0.25, 0.99, 1e-5)
    assert QuantizerParams().model_dump() == {
        "codebook_dim": None, "whitening_dim": None, "distance": None, "estimator": "straight_through",
        "decay_warmup": True, "frozen": False, "input_projection": False, "bridge_group": 0, "legacy": True,
        "levels": (8, 5, 5, 5), "adapter": "mlp", "entropy_cost": 0.1, "diversity": 1.0, "diversity_cost": 0.0,
        "orthogonality_cost": 0.0, "temperature": 1.0, "codebook_cost": 1.0, "revival_decay": 0.0,
        "final_temperature": 0.1, "anneal_steps": 10_000, "inner": "ema", "depth": 4, "shared": False, "dropout": 0.0,
        "groups": 2, "grids": (),
    }  # fmt: skip
    for name, value in {
        "codebook_dim": 0, "levels": (1, 4), "temperature": 0, "dropout": 1.5, "inner": "fsq", "estimator": "none",
        "entropy_cost": float("inf"), "grids": (0, 4),
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=name):
            from_dict(QuantizerParams, {name: value})


def test_a_continuous_latent_has_no_indices():
    module, z = build("none"), np.ones((2, 4, 4, 12), np.float32)
    out = module.apply({}, z)
    np.testing.assert_array_equal(out.z, z)
    assert (out.indices, module.has_indices, module.num_embeddings) == (None, False, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("residual", {"shared": True, "depth": 3}),
        pytest.param("multiscale", {"grids": (1, 2, 4)}, marks=pytest.mark.slow),
    ],
)
def test_a_shared_gumbel_quantizer_anneals_by_steps(name, params):
    steps, z = 2, jnp.ones((2, 4, 4, 12))
    module = build(name, inner="gumbel", temperature=1.0, final_temperature=0.01, anneal_steps=2 * steps, **params)
    variables = jax.jit(module.init)(jax.random.key(0), z)
    train = jax.jit(lambda v, key: module.apply(v, z, True, mutable=["batch_stats"], rngs={"codes": key})[1])
    for step in range(steps):
        variables = {**variables, **train(variables, jax.random.key(step))}

    def temperature(bound):
        return bound.innermost()._temperature()

    assert module.apply(variables, method=temperature) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "name", ["residual", *(pytest.param(n, marks=pytest.mark.slow) for n in ("product", "multiscale"))]
)
def test_inner_bsq_has_corners_on_the_unit_sphere(name):
    module, z = build(name, inner="bsq", groups=3), jnp.ones((1, 4, 4, 12))  # four bits
    bound = module.bind(jax.jit(module.init)(jax.random.key(0), z))
    inner = bound.innermost()
    np.testing.assert_allclose(np.abs(inner.lookup(jnp.arange(16))), 0.5)


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("ema", {"distance": "cosine", "temperature": 0.5, "depth": 8}, {"depth"}),
        ("fsq", {"num_embeddings": 500, "levels": (4, 4)}, {"num_embeddings"}),
        ("fsq", {"codebook_dim": 8}, {"codebook_dim"}),
        ("residual", {"depth": 8, "inner": "ibq", "entropy_cost": 0.2, "groups": 3}, {"groups"}),
        ("residual", {"estimator": "rotation", "legacy": False}, {"legacy"}),
        ("lfq", {"num_embeddings": 64}, set()),
        ("none", {"num_embeddings": 64, "whitening_dim": 8}, {"num_embeddings", "whitening_dim"}),
    ],
)
def test_settings_that_a_quantizer_does_not_read_are_reported(name, fields, expected):
    size = {"num_embeddings": fields.pop("num_embeddings")} if "num_embeddings" in fields else {}
    config = ModelConfig(quantizer=name, quantizer_params=QuantizerParams(**fields), **size)
    assert {path.rpartition(".")[2] for path in unread(config, 12, 4)} == expected


def test_one_linear_map_makes_the_bits_of_all_groups():
    module = build("product", inner="bsq", num_embeddings=2**16, codebook_dim=32)
    assert module == q.Projected(q.Product(q.LFQ(2**16, spherical=True)), 12)


@pytest.mark.parametrize(
    ("name", "fields", "field"),
    [
        ("product", {"num_embeddings": 2**16, "inner": "bsq", "codebook_dim": 24}, "quantizer_params.codebook_dim"),
        ("lfq", {"num_embeddings": 100}, "num_embeddings"),
        ("lfq", {"num_embeddings": 2**25}, "num_embeddings"),
        ("bsq", {"num_embeddings": 1}, "num_embeddings"),
        ("bsq", {"codebook_dim": 5}, "quantizer_params.codebook_dim"),
        ("lfq", {"codebook_dim": 5}, "quantizer_params.codebook_dim"),
        ("residual", {"codebook_dim": 5, "inner": "lfq"}, "quantizer_params.codebook_dim"),
        ("product", {"groups": 5}, "quantizer_params.groups"),
        ("multiscale", {"grids": (1, 2)}, "quantizer_params.grids"),
        ("multiscale", {"grids": (2, 1, 4)}, "quantizer_params.grids"),
        ("multiscale", {"before": True}, "quantize_before_reshape"),
        ("fsq", {"adapter": "none"}, "quantizer_params.adapter"),
        ("fsq", {"levels": (8,) * 11}, "quantizer_params.levels"),
        ("ema", {"distance": "dot", "inner": "ibq"}, "quantizer_params.distance"),
        ("residual", {"distance": "dot"}, "quantizer_params.distance"),
        ("simvq", {"bridge_group": 3}, "quantizer_params.bridge_group"),
        ("multiscale", {"inner": "vq", "revival_decay": 0.9}, "quantizer_params.revival_decay"),
        ("residual", {"inner": "vq", "shared": True, "revival_decay": 0.9}, "quantizer_params.revival_decay"),
        ("ema", {"whitening_dim": 13}, "quantizer_params.whitening_dim"),
    ],
)
def test_errors_name_the_field(name, fields, field):
    with pytest.raises(ConfigError) as error:
        build(name, **fields)
    assert error.value.field == f"model.{field}"
