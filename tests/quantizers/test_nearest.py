import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vqrae_jax.quantizers.blocks import Block, Screen
from vqrae_jax.quantizers.nearest import find_neighbors, nearest, nearest_other

BLOCKS = [None, Block(1, 1), Block(7, 3), Block(64, 64), Block(128, 1000), Screen(None, None), Screen(64, 32)]


@functools.partial(jax.jit, static_argnums=(2, 3))
def search(z, codebook, distance="l2", block=None):
    return nearest(z, codebook, distance, block)


def arrays(N, K, C, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(N, C)).astype(np.float32), rng.normal(size=(K, C)).astype(np.float32)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("N", "K"), [(300, 500), (257, 96), (1, 1), (64, 3)])
def test_equals_brute_force(N, K, block):
    z, codebook = arrays(N, K, 5)
    distance = ((z[:, None].astype(np.float64) - codebook[None]) ** 2).sum(-1)
    indices = search(z, codebook, "l2", block)
    assert indices.dtype == jnp.int32
    np.testing.assert_array_equal(indices, distance.argmin(1))


@pytest.mark.parametrize("block", BLOCKS)
def test_cosine_equals_brute_force_for_any_lengths(block):
    z, codebook = arrays(200, 96, 5)
    codebook *= np.random.default_rng(1).uniform(0.1, 10, size=(96, 1)).astype(np.float32)
    products = z.astype(np.float64) @ codebook.T
    cosines = products / np.linalg.norm(codebook, axis=1)
    np.testing.assert_array_equal(search(z, codebook, "cosine", block), cosines.argmax(1))


@pytest.mark.parametrize("block", BLOCKS)
def test_ties_go_to_the_lowest_index(block):
    """Small integers: every distance is exact, most rows tie."""
    rng = np.random.default_rng(2)
    z, codebook = rng.integers(-2, 3, (128, 2)), rng.integers(-2, 3, (96, 2))
    distance = ((z[:, None] - codebook[None]) ** 2).sum(-1)
    assert ((distance == distance.min(1, keepdims=True)).sum(1) > 1).mean() > 0.5
    indices = search(z.astype(np.float32), codebook.astype(np.float32), "l2", block)
    np.testing.assert_array_equal(indices, distance.argmin(1))


def test_bfloat16_rows_have_the_indices_of_their_float32_values():
    z, codebook = arrays(4096, 512, 16)
    low = jnp.asarray(z, jnp.bfloat16)
    np.testing.assert_array_equal(search(low, codebook), search(low.astype(jnp.float32), codebook))


@pytest.mark.parametrize("block", [None, Block(64, 128), Screen(None, None)])
@pytest.mark.parametrize("codebook_axes", [P(), P("model")], ids=["replicated", "sharded"])
def test_a_sharded_search_exchanges_one_distance_and_index_per_row(codebook_axes, block, mesh, crossings):
    """A screened search exchanges one bit, and the candidates of a sharded codebook."""
    z, codebook = arrays(1024, 2048, 8)
    rows, split = NamedSharding(mesh, P("data")), NamedSharding(mesh, codebook_axes)
    program = jax.jit(lambda z, c: nearest(z, c, "l2", block), in_shardings=(rows, split), out_shardings=rows)
    operations = crossings(program.lower(z, codebook).compile().as_text())
    screens, sharded = isinstance(block, Screen), codebook_axes != P()
    assert bool(operations) == (sharded or screens)
    assert all(size <= ((z.size if screens else len(z)) // 4 if sharded else 1) for _, size in operations)
    assert screens or all(kind == "all-reduce" for kind, _ in operations)
    np.testing.assert_array_equal(program(z, codebook), search(z, codebook))


def test_temporaries_do_not_grow_with_the_product():
    """N = K = 16,384: all distances take 1 GiB."""
    shape = jax.ShapeDtypeStruct((16_384, 32), jnp.float32)
    memory = search.lower(shape, shape).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 32 * 2**20


@pytest.mark.parametrize(("K", "sample"), [(2, 2), (96, 96), (331, 512), (1500, 40)])
def test_nearest_other_equals_brute_force(K, sample):
    _, codebook = arrays(1, K, 5)
    codebook += 100
    codebook[-1] = codebook[0]
    exact = np.sqrt(((codebook[:, None].astype(np.float64) - codebook[None]) ** 2).sum(-1))
    np.fill_diagonal(exact, np.inf)
    count = min(sample, K)
    selected = np.arange(count) * K // count
    distances = jax.jit(nearest_other, static_argnums=1)(codebook, sample)
    np.testing.assert_allclose(distances, exact.min(1)[selected], rtol=1e-4)


def test_neighbors_equal_brute_force():
    _, codebook = arrays(1, 96, 5)
    indices = np.array([3, 95, 3, 0])
    distances = ((codebook[indices, None].astype(np.float64) - codebook) ** 2).sum(-1)
    distances[np.arange(4), indices] = np.inf
    others = find_neighbors(jnp.asarray(codebook) + 100, indices, 7)
    np.testing.assert_array_equal(others, distances.argsort(1)[:, :7])
