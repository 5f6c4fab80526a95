import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax.quantizers import kmeans
from vqrae_jax.quantizers.vq import VQ

K, C, DECAY = 16, 4, 0.5
MODULE = VQ(K, C, codebook_init="normal", revival_decay=DECAY)


@jax.jit
def step(variables, z, seed=0):
    return MODULE.apply(variables, z, True, mutable=["batch_stats"], rngs={"codes": jax.random.key(seed)})


@pytest.fixture
def variables():
    """Embeddings of which one is near the latents and the others have never been used."""
    offset = np.random.default_rng(1).normal(size=(K, C)).astype(np.float32)
    first = np.full((K, C), 100, np.float32)
    first[3] = -offset[3]
    state = {"first": jnp.asarray(first), "uses": jnp.zeros(K)}
    return {"params": {"codebook": {"offset": jnp.asarray(offset)}}, "batch_stats": {"codebook": state}}


def embeddings(variables):
    return np.asarray(variables["params"]["codebook"]["offset"] + variables["batch_stats"]["codebook"]["first"])


@pytest.fixture(scope="module")
def z():
    return np.random.default_rng(0).normal(size=(40, C)).astype(np.float32)


def test_unused_embeddings_move_to_latents_and_the_used_one_stays(variables, z):
    out, state = step(variables, z)
    after = {**variables, **state}
    assert set(np.asarray(out.indices)) == {3}
    assert out.metrics["revived"] == K - 1
    np.testing.assert_array_equal(embeddings(after)[3], embeddings(variables)[3])
    np.testing.assert_array_equal(state["batch_stats"]["codebook"]["uses"], K * np.eye(K)[3])
    anchors = np.delete(embeddings(after), 3, axis=0)
    gaps = np.abs(anchors[:, None] - z).max(-1)
    assert gaps.min(1).max() < 0.2  # a thousandth of the way is left
    assert len(set(gaps.argmin(1))) == K - 1
    out, _ = step(after, z, seed=1)
    assert np.count_nonzero(out.metrics["counts"]) == K


def test_a_frozen_codebook_neither_moves_nor_learns(variables, z):
    frozen = MODULE.clone(frozen=True)

    def loss(params):
        out, state = frozen.apply({**variables, "params": params}, z, True, mutable=["batch_stats"])
        return out.loss + jnp.sum(out.z), (out, state["batch_stats"])

    gradient, (out, state) = jax.grad(loss, has_aux=True)(variables["params"])
    jax.tree.map(np.testing.assert_array_equal, state, variables["batch_stats"])
    assert not np.any(gradient["codebook"]["offset"])
    np.testing.assert_array_equal(out.z, frozen.apply(variables, out.indices, method="lookup"))


def test_embeddings_move_by_the_formula_of_the_paper(variables, z, assert_close):
    """The paper: mean <- decay mean + (1 - decay) share; alpha = exp(-10 K mean / (1 - decay) - 0.001)."""
    mean = np.random.default_rng(2).uniform(0, 0.02, K) * (np.arange(K) != 3)
    variables["batch_stats"]["codebook"]["uses"] = jnp.asarray(K * mean / (1 - DECAY), jnp.float32)
    out, state = step(variables, z)
    mean = DECAY * mean + (1 - DECAY) * np.asarray(out.metrics["counts"]) / len(z)
    alpha = np.exp(-10 * K * mean / (1 - DECAY) - 1e-3)[:, None]
    before, after = embeddings(variables), embeddings({**variables, **state})
    assert out.metrics["revived"] == np.sum(alpha > 0.5)
    assert 0 < np.sum(alpha > 0.5) < K - 1
    anchors = np.delete((after - (1 - alpha) * before) / alpha, 3, axis=0)
    np.testing.assert_allclose(np.abs(anchors[:, None] - z).max(-1).min(1), 0, atol=2e-3)


@pytest.mark.parametrize("good", [0, 5])
def test_latents_that_are_not_finite_are_no_anchors(variables, z, good):
    z = np.where(np.arange(len(z))[:, None] < good, z, np.nan)
    out, state = step(variables, z)
    moved = np.abs(embeddings({**variables, **state})).max(1) < 50
    assert out.metrics["revived"] == np.delete(moved, 3).sum() <= good
    if good:
        assert moved.sum() > 1
    else:
        jax.tree.map(np.testing.assert_array_equal, state["batch_stats"], variables["batch_stats"])


def test_the_call_that_makes_a_codebook_moves_nothing(z):
    """The micro-batches of its step use this codebook."""
    module = VQ(2 * len(z), C, revival_decay=DECAY)  # half of the embeddings repeat latents and are unused
    variables, moved = module.init(jax.random.key(0), z), []
    for seed in range(2):
        out, state = module.apply(variables, z, True, mutable=["batch_stats"], rngs={"codes": jax.random.key(seed)})
        variables |= state
        moved.append(int(out.metrics["revived"]))
    assert moved[0] == 0 < moved[1]


def test_without_revival_there_is_no_count_of_uses(z):
    for init, expected in (("normal", {"offset"}), ("kmeans", {"offset", "first", "begun"})):
        plain = VQ(K, C, codebook_init=init)
        tree = jax.eval_shape(plain.init, jax.random.key(0), z)
        assert set().union(*(leaves["codebook"] for leaves in tree.values())) == expected


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_losses_and_gradients_equal_llamagen(golden, assert_close, distance):
    """The commitment loss of LlamaGen includes its weight beta; all losses are means over elements, as here."""
    arrays = np.load(golden / "quantizers" / f"llamagen_vq_{distance}.npz")
    z, cotangent = (jnp.moveaxis(arrays[name], 1, -1) for name in ("z", "cotangent"))
    module = VQ(*arrays["codebook"].shape, float(arrays["beta"]), "normal", distance)

    def scalar(codebook, z):
        variables = {"params": {"codebook": {"offset": codebook}}}
        out = module.apply(variables, z, True)
        commitment = module.clone(codebook_cost=0.0).apply(variables, z, True).loss
        return jnp.sum(out.z * cotangent) + out.loss, (out, commitment)

    gradients, (out, commitment) = jax.jit(jax.grad(scalar, (0, 1), has_aux=True))(jnp.asarray(arrays["codebook"]), z)
    np.testing.assert_array_equal(out.indices, arrays["indices"])
    assert_close(jnp.moveaxis(out.z, -1, 1), arrays["quantized"], 1e-5, "z")
    assert_close(commitment, arrays["commitment_loss"], 1e-5, "commitment loss")
    assert_close(out.loss - commitment, arrays["codebook_loss"], 1e-5, "codebook loss")
    assert_close(gradients[0], arrays["grad_codebook"], 1e-5, "gradient of the codebook")
    assert_close(jnp.moveaxis(gradients[1], -1, 1), arrays["grad_z"], 1e-5, "gradient of z")


def test_training_with_revival_equals_cvq_vae(golden, assert_close):
    """Three steps of SGD. The anchors are those that the PyTorch layer drew, which repeat latents."""
    arrays = np.load(golden / "quantizers" / "cvq.npz")
    size, decay = len(arrays["init_codebook"]), float(arrays["decay"])
    module = VQ(*arrays["init_codebook"].shape, codebook_init="normal", revival_decay=decay)

    @jax.jit
    def train(variables, z, rows):
        def loss(params):
            out, state = module.apply(
                variables | {"params": params}, z, True, mutable=["batch_stats"], rngs={"codes": jax.random.key(0)}
            )
            return out.loss, (out, state)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kmeans, "draw", lambda *_: rows)
            gradient, (out, state) = jax.grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - arrays["learning_rate"] * g, variables["params"], gradient)
        return out, variables | state, state | {"params": params}

    state = {"first": jnp.asarray(arrays["init_codebook"]), "uses": jnp.zeros(size)}
    variables = {"params": {"codebook": {"offset": jnp.zeros_like(state["first"])}}, "batch_stats": {"codebook": state}}
    for step, z in enumerate(arrays["z"]):
        out, revived, variables = train(variables, jnp.moveaxis(z, 1, -1), arrays["anchor_rows"][step])
        np.testing.assert_array_equal(out.indices, arrays["indices"][step])
        assert_close(out.loss, arrays["loss"][step], 1e-5, "loss")
        assert out.metrics["revived"] == np.sum(arrays["alpha"][step] > 0.5)
        uses = revived["batch_stats"]["codebook"]["uses"]
        assert_close(uses * (1 - decay) / size, arrays["embed_prob"][step], 1e-5, "running mean of the share")
        assert_close(jnp.exp(-10 * uses - 1e-3), arrays["alpha"][step], 1e-5, "alpha")
        assert_close(embeddings(revived), arrays["moved_codebook"][step], 1e-5, "codebook after revival")
        assert_close(embeddings(variables), arrays["codebook"][step], 1e-5, "codebook after the step")
