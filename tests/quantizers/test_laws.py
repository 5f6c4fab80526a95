"""What holds for every quantizer and every option."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vqrae_jax.quantizers.ema import EMAQuantizer
from vqrae_jax.quantizers.fsq import FSQ
from vqrae_jax.quantizers.gumbel import GumbelQuantizer
from vqrae_jax.quantizers.ibq import IBQ
from vqrae_jax.quantizers.lfq import LFQ
from vqrae_jax.quantizers.multiscale import MultiScale
from vqrae_jax.quantizers.product import Product
from vqrae_jax.quantizers.projected import Projected
from vqrae_jax.quantizers.residual import Residual
from vqrae_jax.quantizers.simvq import SimVQ
from vqrae_jax.quantizers.whitened import Whitened

K, C = 16, 6
SHARED = EMAQuantizer(K, C)
QUANTIZERS = {
    "ema": EMAQuantizer(K, C),
    "ema_cosine": EMAQuantizer(K, C, distance="cosine"),
    "ema_rotation": EMAQuantizer(K, C, estimator="rotation"),
    "ema_projected": Projected(EMAQuantizer(K, 3), C, 3),
    "ema_whitened": Whitened(EMAQuantizer(K, 3), C, 3),
    "ema_diverse": Projected(EMAQuantizer(K, 3, diversity_cost=0.1), C, 3),
    "simvq": SimVQ(K, C),
    "simvq_normal": SimVQ(K, C, start="normal", input_projection=True),
    "simvq_diverse": SimVQ(K, C, diversity_cost=0.1, temperature=0.1),
    "fsq": FSQ((4, 3), C),
    "lfq": LFQ(C, group=4),
    "bsq": LFQ(C, spherical=True),
    "gumbel": GumbelQuantizer(K, C),
    "gumbel_normal": GumbelQuantizer(K, C, start="normal"),
    "ibq": IBQ(K, C),
    "ibq_cosine": IBQ(K, C, distance="cosine", temperature=0.1),
    "ibq_normal": IBQ(K, C, start="normal", distance="dot"),
    "residual_shared": Residual((SHARED,) * 2, C),
    "residual_dropout": Residual(tuple(EMAQuantizer(K, C) for _ in range(2)), C, dropout=0.5),
    "product": Product(tuple(EMAQuantizer(K, 3) for _ in range(2)), C),
    "multiscale": MultiScale(EMAQuantizer(K, C), C, (2, 4)),
    "multiscale_gumbel": MultiScale(GumbelQuantizer(K, C), C, (2, 4)),
    "multiscale_projected": MultiScale(Projected(LFQ(4), C, 4), C, (2, 4)),
}
# Compiling is all that these tests spend time on.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

each = pytest.mark.parametrize("name", QUANTIZERS)
# One of every way in which arrays meet; the others differ in arithmetic within a token only.
KINDS = [
    "ema",
    "ema_whitened",
    "ema_diverse",
    "simvq_diverse",
    "fsq",
    "lfq",
    "gumbel",
    "ibq",
    "residual_dropout",
    "product",
    "multiscale",
]


@functools.cache
def z(scale=1.0):
    return scale * np.random.default_rng(0).normal(size=(8, 4, 4, C)).astype(np.float32)


@functools.cache
def trained(name):
    """Variables after two training steps, so that nothing is at its initial value."""
    module = QUANTIZERS[name]
    variables = jit(module.init)(jax.random.key(0), z())
    for step in range(2):
        _, state = train(name)(variables, z(), jax.random.key(step))
        variables = {**variables, **state}
    return variables


@functools.cache
def train(name):
    module = QUANTIZERS[name]
    return jit(lambda v, z, key: module.apply(v, z, True, mutable=["batch_stats"], rngs={"codes": key}))


@functools.cache
def evaluate(name):
    module = QUANTIZERS[name]
    return jit(lambda v, z: module.apply(v, z, mutable=["batch_stats"]))


@functools.cache
def lookup(name):
    return jit(functools.partial(QUANTIZERS[name].apply, method="lookup"))


@each
def test_lookup_is_the_exact_inverse(name):
    variables = trained(name)
    for scale in (1.0, 100.0):
        out, _ = evaluate(name)(variables, z(scale))
        assert out.indices.dtype == jnp.int32
        np.testing.assert_array_equal(lookup(name)(variables, out.indices), out.z)


@each
def test_evaluation_changes_no_state_and_draws_nothing(name):
    variables = trained(name)
    _, after = evaluate(name)(variables, z())
    jax.tree.map(np.testing.assert_array_equal, after.get("batch_stats", {}), variables.get("batch_stats", {}))


@pytest.mark.parametrize("name", KINDS)
def test_bfloat16_latents_get_the_codes_of_their_float32_values(name):
    low = jnp.asarray(z(), jnp.bfloat16)
    outs = [evaluate(name)(trained(name), x)[0] for x in (low, low.astype(jnp.float32))]
    np.testing.assert_array_equal(outs[0].indices, outs[1].indices)
    assert outs[0].z.dtype == outs[0].loss.dtype == jnp.float32


@each
def test_counts_and_metrics(name):
    out, _ = train(name)(trained(name), z(), jax.random.key(3))
    counts = np.asarray(out.metrics["counts"])
    indices = np.asarray(out.indices)
    assert counts.dtype == np.int32
    assert counts.sum() == (indices >= 0).sum()
    assert counts.shape[-1] == QUANTIZERS[name].num_embeddings
    assert 0 <= indices[indices >= 0].max() < counts.shape[-1]
    assert out.metrics["nonfinite"] == 0
    assert all(np.ndim(value) == 0 for key, value in out.metrics.items() if key != "counts")


@each
def test_nonfinite_latents_are_reported_and_poison_nothing(name):
    variables = trained(name)
    bad = z().copy()
    bad[0, 1, 2, 0], bad[3, 3, 3, 1], bad[5, 0, 0, 2] = np.nan, np.inf, -np.inf
    out, after = train(name)(variables, bad, jax.random.key(3))
    assert out.metrics["nonfinite"] >= 1
    if name != "product":
        assert out.metrics["nonfinite"] == 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((out, after)))
    gradients = gradient(name)(variables.get("params", {}), bad, variables)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@functools.cache
def gradient(name):
    module = QUANTIZERS[name]

    def scalar(params, latents, variables):
        variables = {**variables, "params": params}
        out, _ = module.apply(variables, latents, True, mutable=["batch_stats"], rngs={"codes": jax.random.key(5)})
        return out.loss + jnp.sum(jnp.sin(out.z))

    return jit(jax.grad(scalar, (0, 1)))


@each
def test_every_parameter_and_the_latents_receive_a_gradient(name):
    variables = trained(name)
    params, latents = gradient(name)(variables.get("params", {}), z(), variables)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(params))
    assert np.mean(np.any(latents, axis=-1)) > 0.9


@each
def test_codes_are_those_of_one_codebook(name):
    codes = jit(functools.partial(QUANTIZERS[name].apply, method="embeddings"))(trained(name))
    if name in ("fsq", "lfq", "bsq", "multiscale_projected"):
        assert codes is None
    else:
        assert len(codes) == K
        assert np.isfinite(codes).all()


@pytest.mark.parametrize("name", KINDS)
def test_eight_devices_give_what_one_gives(name):
    """4x2 mesh; every codebook split over "model"."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    module, alone = QUANTIZERS[name], trained(name)

    def place(path, leaf):
        split = path[-1].key in ("codebook", "sums", "first", "offset") and leaf.shape[0] % 2 == 0
        return NamedSharding(mesh, P("model") if split else P())

    shardings = jax.tree.map_with_path(place, alone)
    spread = jax.device_put(alone, shardings)
    step = jit(
        lambda v, z, k: module.apply(v, z, True, mutable=["batch_stats"], rngs={"codes": k}),
        in_shardings=(shardings, NamedSharding(mesh, P("data")), NamedSharding(mesh, P())),
    )
    one, one_state = train(name)(alone, z(), jax.random.key(7))
    many, many_state = step(spread, z(), jax.random.key(7))
    np.testing.assert_array_equal(one.indices, many.indices)
    np.testing.assert_array_equal(one.metrics["counts"], many.metrics["counts"])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, (one.z, one.loss, one_state), (many.z, many.loss, many_state))
