import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax.quantizers.simvq import SimVQ
from vqrae_jax.quantizers.vqbridge import VQBridge

CASES = {
    "simvq": {"input_projection": True},
    "simvq_nolegacy_nozproj": {"legacy": False},
    "simvq_euclid": {"distance": "l2", "input_projection": True},
    "simvq_euclid_nozproj": {"distance": "l2", "legacy": False},
}
NAMES = {"embedding_proj": "codebook_projection", "z_proj": "input_projection"}


def load(golden, case):
    arrays = np.load(golden / "quantizers" / f"{case}.npz")
    K, C = arrays["weight__embedding.weight"].shape
    params = {
        ours: {"kernel": arrays[f"weight__{theirs}.weight"].T, "bias": arrays[f"weight__{theirs}.bias"]}
        for theirs, ours in NAMES.items()
        if f"weight__{theirs}.weight" in arrays
    }
    module = SimVQ(K, C, commitment_cost=0.3, codebook_init="normal", **CASES[case])
    state = {"codebook": arrays["weight__embedding.weight"], "begun": 1}
    return arrays, module, jax.tree.map(jnp.asarray, {"params": params, "batch_stats": state})


@pytest.mark.parametrize(
    "case", [n if n in ("simvq", "simvq_euclid_nozproj") else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_outputs_and_gradients_equal_pytorch(golden, assert_close, case):
    arrays, module, variables = load(golden, case)
    out = jax.jit(module.apply)(variables, arrays["z"])
    np.testing.assert_array_equal(out.indices, arrays["indices"])
    assert_close(out.z, arrays["quantized"], 1e-5, "z")
    assert_close(out.loss, arrays["vq_loss"], 1e-5, "loss")
    grid = jax.jit(module.apply)(variables, jnp.moveaxis(arrays["z_2d"], 1, -1))
    np.testing.assert_array_equal(grid.indices, arrays["indices_2d"])
    assert_close(jnp.moveaxis(grid.z, -1, 1), arrays["quantized_2d"], 1e-5, "z_2d")

    probe = arrays["fixed_random"]
    for prefix, scalar in (("grad_vq_loss", lambda out: out.loss), ("grad_st", lambda out: jnp.sum(out.z * probe))):
        gradient = jax.jit(jax.grad(lambda p, z, f=scalar: f(module.apply(variables | {"params": p}, z)), (0, 1)))
        params, z = gradient(variables["params"], jnp.asarray(arrays["z"]))
        assert_close(z, arrays[f"{prefix}__z"], 1e-5, f"{prefix} z")
        for theirs, ours in NAMES.items():
            if ours in params:
                for leaf, value in (("weight", params[ours]["kernel"].T), ("bias", params[ours]["bias"])):
                    expected = arrays[f"{prefix}__{theirs}.{leaf}"]
                    if expected.any():
                        assert_close(value, expected, 1e-5, f"{prefix} {theirs}.{leaf}")
                    else:
                        np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("group", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_one_gradient_step_moves_every_embedding(group):
    """Eight latents choose at most eight of 64; a bridge first moves embeddings at the same place of their group."""
    z = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    module = SimVQ(64, 6, bridge_group=group)
    variables = jax.jit(module.init)(jax.random.key(0), z)
    gradient = jax.jit(jax.grad(lambda p: module.apply(variables | {"params": p}, z).loss))(variables["params"])
    params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradient)
    embeddings = jax.jit(functools.partial(module.apply, method="embeddings"))
    before, after = (embeddings(variables | {"params": p}) for p in (variables["params"], params))
    assert np.all(np.abs(after - before).max(axis=1) > 1e-6)


def test_a_bridge_starts_as_the_identity_and_mixes_groups():
    codebook = jnp.asarray(np.random.default_rng(0).normal(size=(32, 6)), jnp.float32)
    bridge = VQBridge(8)
    jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    params, apply = jit(bridge.init)(jax.random.key(0), codebook), jit(bridge.apply)
    np.testing.assert_array_equal(apply(params, codebook), codebook)
    recover = params["params"]["recover"] | {"kernel": jax.random.normal(jax.random.key(1), (256, 48))}
    params = {"params": params["params"] | {"recover": recover}}
    change = apply(params, codebook.at[0].add(1.0)) - apply(params, codebook)
    assert np.all(np.abs(change).max(axis=1) > 1e-4)
