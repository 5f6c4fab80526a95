"""The generator's inputs and outputs, causality, its cache, likelihoods, and equal results over any mesh."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax import sharding
from vqrae_jax.generation import masking
from vqrae_jax.generation.autoregression import permuted_orders
from vqrae_jax.models.generator import Architecture, CodeTransformer
from vqrae_jax.models.vit import BlocksConfig

K, CLASSES = 24, 3
BLOCKS = BlocksConfig(16, 2, 2, 32)
CAUSAL = dataclasses.replace(BLOCKS, causal=True)
RICH = dataclasses.replace(CAUSAL, qk_norm=True, gated=True, act="silu")
CONFIGS = {
    "masked": Architecture(BLOCKS, K, ((3, 3),), classes=CLASSES),
    "codebook": Architecture(BLOCKS, K, ((2, 2),), levels=2, code_channels=5, pos="rope", registers=1),
    "rich": Architecture(
        RICH, K, ((1, 1), (2, 2)), levels=2, classes=CLASSES, adaln=True, registers=2, pos="rope", tied=False
    ),
    "factors": Architecture(CAUSAL, K, ((2, 3),), factors=(4, 6)),
}


class Case:
    """A generator with random variables, also where they are initially zero, and inputs."""

    def __init__(self, name):
        self.config, self.model = CONFIGS[name], CodeTransformer(CONFIGS[name])
        high = K if self.config.blocks.causal else K + 1
        self.indices = jax.random.randint(jax.random.key(1), (8, self.config.length), 0, high)
        self.label = jnp.arange(8) % CLASSES
        self.initial = jax.jit(self.model.init)(jax.random.key(0), self.indices)
        rng = np.random.default_rng(2)
        self.variables = jax.tree.map(
            lambda x: jax.device_put(x + 0.2 * rng.normal(size=x.shape).astype(np.float32)),
            jax.device_get(self.initial),
        )
        self.apply = jax.jit(self.model.apply, static_argnames="method")
        self.logits = self.apply(self.variables, self.indices, self.label)


@pytest.fixture(scope="module")
def case():
    return functools.cache(Case)


@pytest.mark.parametrize("name", [n if n == "factors" else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS])
def test_logits_are_float32_and_no_label_is_the_unconditional_label(case, name):
    case = case(name)
    config, indices = case.config, case.indices
    assert case.logits.shape == (8, config.length, sum(config.vocabulary))
    assert case.logits.dtype == jnp.float32
    unconditional = case.apply(case.variables, indices, jnp.full(8, config.classes))
    np.testing.assert_array_equal(unconditional, case.apply(case.variables, indices))
    assert (np.abs(unconditional - case.logits).max() > 1e-3) == bool(config.classes)
    assert not sharding.unmatched(case.variables)


def test_a_hidden_index_differs_from_every_other(case):
    case = case("masked")
    logits = [case.apply(case.variables, case.indices.at[:, 0].set(index))[:, 1:] for index in (0, K - 1, K)]
    assert min(np.abs(a - b).max() for a, b in zip(logits, logits[1:] + logits[:1], strict=True)) > 1e-3


@pytest.mark.parametrize("name", [pytest.param("rich", marks=pytest.mark.slow), "factors"])
@pytest.mark.parametrize("permuted", [False, True])
def test_a_code_changes_only_the_logits_of_later_codes(case, name, permuted):
    case = case(name)
    config = case.config
    orders = permuted_orders(jax.random.key(3), (8, config.positions), 1.0 if permuted else 0.0)
    rank = np.asarray(jnp.argsort(orders))[:, :, None] * config.levels + np.arange(config.levels)
    rank = rank.reshape(8, config.length)
    place = np.argmax(rank == config.length // 2, axis=1)
    changed = case.indices.at[jnp.arange(8), place].add(1) % K
    changed = jnp.where(jnp.arange(config.length) == place[:, None], changed, case.indices)
    logits, other = (case.apply(case.variables, x, case.label, orders) for x in (case.indices, changed))
    differ = np.abs(logits - other).max(-1) > 0
    np.testing.assert_array_equal(differ, rank > config.length // 2)
    if not permuted:
        np.testing.assert_allclose(logits, case.logits, atol=1e-5)


@pytest.mark.parametrize("name", ["rich", "factors"])
def test_the_cache_gives_the_logits_of_the_full_pass(case, name):
    case = case(name)

    @jax.jit
    def run(variables, indices, label):
        def visit(carry, code):
            cache, previous = carry
            logits, cache = case.model.apply(variables, cache, previous, code, method="step")
            return (cache, indices[:, code]), logits

        first = case.model.apply(variables, label, method="start"), jnp.full(8, K)
        return jax.lax.scan(visit, first, jnp.arange(case.config.length))[1].swapaxes(0, 1)

    np.testing.assert_allclose(run(case.variables, case.indices, case.label), case.logits, atol=1e-5)


@pytest.mark.parametrize("name", ["codebook", pytest.param("rich", marks=pytest.mark.slow)])
def test_cross_entropy_is_that_of_the_logits(case, name):
    case = case(name)
    targets = jax.random.randint(jax.random.key(4), case.indices.shape, 0, K)
    nats, correct = case.apply(case.variables, case.indices, case.label, targets, method="cross_entropy")
    np.testing.assert_allclose(nats, masking.cross_entropy(case.logits, targets), atol=1e-5)
    np.testing.assert_array_equal(correct, case.logits.argmax(-1) == targets)


@pytest.mark.slow
def test_probabilities_of_a_factorized_head_sum_to_one(case):
    case = case("factors")
    all_codes = jnp.broadcast_to(jnp.arange(K)[:, None], (K, case.config.length))
    context = jnp.broadcast_to(case.indices[:1], all_codes.shape)
    nats, _ = case.apply(case.variables, context, None, all_codes, method="cross_entropy")
    np.testing.assert_allclose(jnp.exp(-nats).sum(0), 1, atol=1e-6)


@pytest.mark.parametrize("permuted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_likelihoods_of_all_images_sum_to_one(permuted):
    config = Architecture(CAUSAL, 3, ((1, 3),), levels=2)
    model, images = CodeTransformer(config), jnp.asarray(list(itertools.product(range(3), repeat=6)))
    variables = jax.jit(model.init)(jax.random.key(0), images[:1])
    variables = jax.tree.map(lambda x: 10 * x, variables)
    order = jnp.tile(jnp.asarray([2, 0, 1]), (len(images), 1)) if permuted else None
    nats, _ = jax.jit(functools.partial(model.apply, method="cross_entropy"))(variables, images, order=order)
    assert np.std(nats.sum(1)) > 0.1
    np.testing.assert_allclose(jnp.exp(-nats.sum(1)).sum(), 1, atol=1e-5)


@pytest.mark.slow
def test_classes_modulate_the_blocks_only_after_training():
    config = dataclasses.replace(CONFIGS["masked"], adaln=True, class_token=False)
    model, indices = CodeTransformer(config), jnp.zeros((1, 9), int)
    variables = jax.jit(model.init)(jax.random.key(0), indices)
    apply = jax.jit(model.apply)
    logits = apply(variables, indices, jnp.zeros(1, int))
    np.testing.assert_array_equal(logits, apply(variables, indices, jnp.ones(1, int)))
    # Every block is the identity.
    noise = jax.tree.map(lambda x: x + 1, variables["params"]["blocks"])
    np.testing.assert_array_equal(logits, apply({"params": variables["params"] | {"blocks": noise}}, indices))
    variables["params"]["modulation"]["kernel"] += 0.1 * jax.random.normal(jax.random.key(1), (16, 2, 6, 16))
    labels = jnp.zeros(1, int), jnp.ones(1, int)
    assert np.ptp([apply(variables, indices, label) for label in labels], axis=0).max() > 1e-3


@pytest.mark.slow
def test_dropout_needs_its_stream_of_random_numbers(case):
    case = case("masked")
    blocks = dataclasses.replace(BLOCKS, dropout=0.5)
    apply = jax.jit(CodeTransformer(dataclasses.replace(case.config, blocks=blocks)).apply)
    inputs = (case.variables, case.indices, case.label)
    np.testing.assert_array_equal(apply(*inputs), case.logits)
    first, again, other = (apply(*inputs, rngs={"dropout": jax.random.key(i)}) for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert min(np.abs(first - x).max() for x in (other, case.logits)) > 0.1


def test_codebook_vectors_are_fixed_and_replace_the_table(case):
    case = case("codebook")
    assert "code_embed" not in case.variables["params"]
    assert case.initial["frozen"]["code_vectors"].shape == (2, K, 5)
    # Codes with equal vectors are the same input.
    vectors = case.variables["frozen"]["code_vectors"]
    variables = case.variables | {"frozen": {"code_vectors": vectors.at[:, 1].set(vectors[:, 0])}}
    a, b = (case.apply(variables, case.indices.at[:, 3].set(i)) for i in (0, 1))
    np.testing.assert_array_equal(a, b)


def test_bfloat16_has_float32_logits_and_invalid_sizes_are_refused(case):
    case = case("rich")
    half = dataclasses.replace(case.config, blocks=dataclasses.replace(RICH, dtype="bfloat16"))
    logits = jax.jit(CodeTransformer(half).apply)(case.variables, case.indices, case.label)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, case.logits, atol=0.05 * float(jnp.abs(case.logits).max()))
    with pytest.raises(ValueError, match="10"):
        case.model.apply(case.variables, jnp.zeros((2, 9), int))
    for fields in ({"factors": (5, 5)}, {"factors": (4, 6), "code_channels": 3}):
        with pytest.raises(ValueError, match="factors"):
            dataclasses.replace(CONFIGS["masked"], **fields)


@pytest.mark.slow  # tests/train/test_generator.py has a training step over a mesh
@pytest.mark.parametrize(("model_axis", "fsdp"), [(1, True), (2, False), (2, True), (8, False)])
def test_loss_and_gradients_over_a_mesh(case, model_axis, fsdp):
    case, mesh = case("rich"), sharding.make_mesh(model=model_axis)

    def run(params, indices, label, shard=None):
        blocks = dataclasses.replace(RICH, shard_activations=shard)
        model = CodeTransformer(dataclasses.replace(case.config, blocks=blocks))

        def loss(params):
            return model.apply({"params": params}, indices, label, method="cross_entropy")[0].mean()

        return jax.value_and_grad(loss)(params)

    params = case.variables["params"]
    expected = jax.jit(run)(params, case.indices, case.label)
    placed = jax.device_put(params, sharding.shardings(params, mesh, fsdp, 64))
    split = {axis for x in jax.tree.leaves(placed) for axis in x.sharding.spec if axis}
    assert split == {name for name, used in (("model", model_axis > 1), ("data", fsdp)) if used}
    batch = jax.device_put((case.indices, case.label), sharding.over_data(mesh))
    run = jax.jit(functools.partial(run, shard=functools.partial(sharding.pin_batch, mesh=mesh, free=True)))
    program = run.lower(placed, *batch).compile()
    for a, b in zip(jax.tree.leaves(program(placed, *batch)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    # Parameters are gathered, not activations, which have the axes B, T or B, N, L. Of a table that is split over both
    # axes of the mesh, the partitioner gathers the embedded codes instead, once.
    gathered = re.findall(r"f32\[8,(?:10|13|5,2),\S* all-gather.*", program.as_text())
    assert len(gathered) <= (model_axis == 2 and fsdp)
    assert all("_inputs/gather" in line for line in gathered)
