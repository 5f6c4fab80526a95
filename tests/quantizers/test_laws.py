"""Laws of every registered quantizer, of its options and of the wrappers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vqrae_jax import sharding
from vqrae_jax.config import ModelConfig, QuantizerParams
from vqrae_jax.models.resampler import Resampled
from vqrae_jax.models.vit import BlocksConfig
from vqrae_jax.quantizers.ema import EMAQuantizer
from vqrae_jax.quantizers.factory import create
from vqrae_jax.quantizers.fusion import LEARNED, Fused
from vqrae_jax.quantizers.registry import QUANTIZERS

K, C, GRID = 16, 6, 4
TOKENS = 7  # of a resampler


def build(quantizer, codebook_init="kmeans", size=K, **params):
    params = QuantizerParams(**{"groups": 2, "depth": 2, "grids": (2, 4), **params})
    model = ModelConfig(quantizer=quantizer, num_embeddings=size, codebook_init=codebook_init, quantizer_params=params)
    return create(model, C, GRID)


# Every registered quantizer with its defaults, and options under names of their own.
OPTIONS = {
    "ema_cosine": ("ema", {"distance": "cosine"}),
    "ema_angle": ("ema", {"distance": "angle"}),
    "vq_cosine": ("vq", {"distance": "cosine", "diversity_cost": 0.1}),
    "vq_angle": ("vq", {"distance": "angle", "estimator": "rotation"}),
    "vq_revival": ("vq", {"revival_decay": 0.5}),
    "vq_normal": ("vq", {"codebook_init": "normal", "revival_decay": 0.9, "distance": "cosine"}),
    "vq_diveq": ("vq", {"estimator": "diveq", "codebook_cost": 0.0}),
    "simvq_angle": ("simvq", {"distance": "angle"}),
    "ibq_angle": ("ibq", {"distance": "angle", "temperature": 0.1}),
    "ema_rotation": ("ema", {"estimator": "rotation"}),
    "ema_projected": ("ema", {"codebook_dim": 3}),
    "ema_whitened": ("ema", {"whitening_dim": 3}),
    "ema_diverse": ("ema", {"codebook_dim": 3, "diversity_cost": 0.1}),
    "simvq_normal": ("simvq", {"codebook_init": "normal", "input_projection": True}),
    "simvq_diverse": ("simvq", {"diversity_cost": 0.1, "temperature": 0.1}),
    "simvq_bridge": ("simvq", {"bridge_group": 4}),
    "fsq_linear": ("fsq", {"levels": (4, 3), "adapter": "linear"}),
    "gumbel_normal": ("gumbel", {"codebook_init": "normal"}),
    "ibq_cosine": ("ibq", {"distance": "cosine", "temperature": 0.1}),
    "ibq_normal": ("ibq", {"codebook_init": "normal", "distance": "dot"}),
    "residual_shared": ("residual", {"shared": True}),
    "residual_dropout": ("residual", {"dropout": 0.5}),
    "multiscale_gumbel": ("multiscale", {"inner": "gumbel"}),
    "multiscale_lfq": ("multiscale", {"inner": "lfq"}),
}
CASES = {name: (name, {}) for name in QUANTIZERS if name != "none"} | OPTIONS
MODULES = {name: build(quantizer, **params) for name, (quantizer, params) in CASES.items()}
MODULES |= {f"fused_{method}": Fused(EMAQuantizer(K, C // 2), C // 2, 2, method) for method in LEARNED}
MODULES["resampled"] = Resampled(EMAQuantizer(K, C), BlocksConfig(C, 1, 2, 2 * C), TOKENS)
# Compiling is nearly all that these tests spend time on.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# One case of every way in which arrays interact, and of distances and estimators with code of their own; the others
# differ in arithmetic within a token only.
KINDS = (
    "ema", "ema_whitened", "ema_diverse", "vq_revival", "simvq_diverse", "simvq_bridge", "fsq", "lfq",
    "gumbel", "ibq", "residual_dropout", "product", "multiscale",
    "ema_angle", "vq_angle", "vq_diveq", "fused_routed", "resampled",
)  # fmt: skip
FAST = ("ema", "simvq_diverse", "fsq", "product")  # a buffer, a learned codebook, no codebook, parts; others are slow


def cases(names, fast=FAST):
    return pytest.mark.parametrize("name", [n if n in fast else pytest.param(n, marks=pytest.mark.slow) for n in names])


kinds, each = cases(KINDS), cases(MODULES)


@functools.cache
def z(scale=1.0):
    return scale * np.random.default_rng(0).normal(size=(8, GRID, GRID, C)).astype(np.float32)


@functools.cache
def initial(name):
    return jit(MODULES[name].init)(jax.random.key(0), z())


@functools.cache
def trained(name):
    """Returns variables after two training steps, so that no leaf has its initial value."""
    variables = initial(name)
    for step in range(2):
        _, state, (gradients, _) = train(name, variables, z(), jax.random.key(step))
        params = jax.tree.map(lambda p, g: p - 1e-3 * np.sign(g), variables.get("params", {}), gradients)
        variables = {**variables, **state, "params": params}
    return variables


@functools.partial(jit, static_argnums=0)
def train(name, variables, latents, key):
    """Returns the output, the new state, and the gradients of parameters and latents."""

    def loss(params, latents):
        module, rngs = MODULES[name], {"codes": key}
        out, state = module.apply({**variables, "params": params}, latents, True, mutable=["batch_stats"], rngs=rngs)
        return out.loss + jnp.sum(jnp.sin(out.z)), (out, state)

    gradients, (out, state) = jax.grad(loss, (0, 1), has_aux=True)(variables.get("params", {}), latents)
    return out, state, gradients


@functools.partial(jit, static_argnums=0)
def evaluate(name, variables, latents):
    return MODULES[name].apply(variables, latents, mutable=["batch_stats"])


@each
def test_lookup_is_the_exact_inverse_and_evaluation_changes_no_state(name):
    """Evaluation has no random numbers."""
    variables = trained(name)
    lookup = jit(functools.partial(MODULES[name].apply, method="lookup"))
    for scale in (1.0, 100.0):
        out, after = evaluate(name, variables, z(scale))
        assert out.indices.dtype == jnp.int32
        positions = (TOKENS,) if name == "resampled" else (GRID, GRID)
        assert out.z.shape == (8, *positions, MODULES[name].channels)
        np.testing.assert_array_equal(lookup(variables, out.indices), out.z)
    jax.tree.map(np.testing.assert_array_equal, after.get("batch_stats", {}), variables.get("batch_stats", {}))


@cases(KINDS, fast=["ema"])
def test_other_indices_differ_and_may_be_those_of_near_embeddings(name, mesh):
    """They are a function of the key, on any devices."""
    variables, indices = trained(name), np.maximum(evaluate(name, trained(name), z())[0].indices, 0)
    call = functools.partial(MODULES[name].apply, method="change_indices")
    sample = jit(call, static_argnums=3)
    for neighbors in (0, 1):
        others = sample(variables, indices, jax.random.key(0), neighbors)
        assert others.dtype == jnp.int32
        assert np.all((others != indices) & (others >= 0) & (others < MODULES[name].num_embeddings))
        split = jax.device_put(indices, NamedSharding(mesh, P("data")))
        np.testing.assert_array_equal(sample(variables, split, jax.random.key(0), neighbors), others)
    assert (others != sample(variables, indices, jax.random.key(1), 0)).any()
    embeddings = jit(functools.partial(MODULES[name].apply, method="embeddings"))(variables)
    if embeddings is not None:  # several indices per latent: those of the first codebook
        first = [x[..., 0] if name in ("product", "residual_dropout") else x for x in (indices, others)]
        distances = ((embeddings[:, None] - embeddings) ** 2).sum(-1) + 1e9 * np.eye(len(embeddings))
        np.testing.assert_array_equal(first[1], distances.argmin(1)[first[0]])


@cases(["ema_angle", "vq_angle", "simvq_angle", "ibq_angle"], fast=("ema_angle",))
def test_angles_choose_embeddings_that_keep_their_length(name):
    """Lengths of latents change no index, and the codebook has lengths of its own."""
    lengths = np.random.default_rng(1).uniform(0.1, 10, (8, GRID, GRID, 1)).astype(np.float32)
    one, other = (evaluate(name, trained(name), x)[0] for x in (z(), lengths * z()))
    np.testing.assert_array_equal(one.indices, other.indices)
    norms = np.linalg.norm(np.asarray(one.z), axis=-1)
    assert norms.std() > 0.1


@kinds
def test_bfloat16_latents_have_the_indices_of_their_float32_values(name):
    low = jnp.asarray(z(), jnp.bfloat16)
    outs = [evaluate(name, trained(name), x)[0] for x in (low, low.astype(jnp.float32))]
    np.testing.assert_array_equal(outs[0].indices, outs[1].indices)
    assert outs[0].z.dtype == outs[0].loss.dtype == jnp.float32


@each
def test_counts_and_metrics(name):
    out, *_ = train(name, trained(name), z(), jax.random.key(3))
    counts, indices = np.asarray(out.metrics["counts"]), np.asarray(out.indices)
    assert counts.dtype == np.int32
    assert counts.sum() == (indices >= 0).sum()
    assert counts.shape[-1] == MODULES[name].num_embeddings
    assert 0 <= indices[indices >= 0].max() < counts.shape[-1]
    assert out.metrics["nonfinite"] == 0
    assert all(np.ndim(value) == 0 for key, value in out.metrics.items() if key != "counts")


@each
def test_nonfinite_latents_are_counted_and_change_nothing_else(name):
    variables = trained(name)
    bad = z().copy()
    bad[0, 1, 2, 0], bad[3, 3, 3, 1], bad[5, 0, 0, 2] = np.nan, np.inf, -np.inf
    result = train(name, variables, bad, jax.random.key(3))
    nonfinite = result[0].metrics["nonfinite"] / (TOKENS if name == "resampled" else 1)  # all tokens of an image
    assert nonfinite == 3 or (name == "product" and nonfinite >= 1)  # whose groups count their own channels
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))


@each
def test_latents_of_any_size_keep_state_and_indices_valid(name):
    """bfloat16 reaches from 1e-40 to 3e38, whose squares have no value in float32."""
    rng = np.random.default_rng(0)
    extreme = z() * 10.0 ** rng.integers(-40, 39, z().shape[:3])[..., None]
    extreme[0, 0] = [[0.0], [np.inf], [np.nan], [1e-45]]
    extreme = np.asarray(jnp.asarray(extreme, jnp.bfloat16), np.float32)
    for variables in (initial(name), trained(name)):
        for latents in (extreme, 1e-30 * z()):
            out, state, _ = train(name, variables, latents, jax.random.key(1))
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((out, state)))
            assert np.all((np.asarray(out.indices) >= -1) & (np.asarray(out.indices) < MODULES[name].num_embeddings))
            variables = {**variables, **state}


@pytest.mark.parametrize(
    "quantizer",
    ["ema", *(pytest.param(n, marks=pytest.mark.slow) for n in ("simvq", "gumbel", "ibq", "residual", "product"))],
)
def test_a_codebook_of_one_embedding(quantizer):
    module = build(quantizer, size=1)
    variables, apply = jit(module.init)(jax.random.key(0), z()), jit(module.apply, static_argnames=("train", "mutable"))
    for key in range(2):
        out, state = apply(variables, z(), train=True, mutable=("batch_stats",), rngs={"codes": jax.random.key(key)})
        variables = {**variables, **state}
        assert not np.any(out.indices)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((out, variables)))


@each
def test_every_parameter_and_the_latents_receive_a_gradient(name):
    *_, (params, latents) = train(name, trained(name), z(), jax.random.key(5))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(params))
    assert np.mean(np.any(latents, axis=-1)) > 0.9


@each
def test_the_protocol_and_the_sharding_rules_are_complete(name, mesh):
    """Leaves with an axis of length K are split over "model", by the `codebook` axes of the registry."""
    module = MODULES[name]
    assert (module.has_indices, type(module.num_embeddings)) == (True, int)
    assert bool(module.prefixes) == name.startswith(("residual", "multiscale"))
    embeddings = jit(functools.partial(module.apply, method="embeddings"))(trained(name))
    if embeddings is not None:
        assert len(embeddings) == module.num_embeddings
        assert np.isfinite(embeddings).all()
    assert (embeddings is None) == (name.startswith(("fsq", "lfq", "bsq")) or name == "multiscale_lfq")
    variables = {kind: {"quantizer": tree} for kind, tree in trained(name).items()}
    assert sharding.unmatched(variables) == []
    leaves, shardings = jax.tree.leaves_with_path(variables), jax.tree.leaves(sharding.shardings(variables, mesh))
    for (path, leaf), placed in zip(leaves, shardings, strict=True):
        if not any(key.key in ("attn", "mlp") for key in path):  # transformer blocks have their own rules
            assert ("model" in placed.spec) == (K in leaf.shape), leaf.shape


@cases(KINDS, fast=["ema", "product"])
def test_eight_devices_give_the_results_of_one(name, mesh):
    """4x2 mesh, with every codebook split over "model"."""
    module, alone = MODULES[name], trained(name)
    placed = {kind: sharding.shardings({"quantizer": tree}, mesh)["quantizer"] for kind, tree in alone.items()}
    step = jit(
        lambda v, z, k: module.apply(v, z, True, mutable=["batch_stats"], rngs={"codes": k}),
        in_shardings=(placed, NamedSharding(mesh, P("data")), NamedSharding(mesh, P())),
    )
    one, one_state, _ = train(name, alone, z(), jax.random.key(7))
    many, many_state = step(jax.device_put(alone, placed), z(), jax.random.key(7))
    np.testing.assert_array_equal(one.indices, many.indices)
    np.testing.assert_array_equal(one.metrics["counts"], many.metrics["counts"])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, (one.z, one.loss, one_state), (many.z, many.loss, many_state))
