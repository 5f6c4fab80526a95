"""GAN losses, DiffAug and the adaptive weight equal those of the PyTorch VQRAE."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax.losses import adversarial
from vqrae_jax.losses.augment import apply_augmentations, augment


def test_losses_equal_pytorch_and_their_definitions(golden):
    z = np.load(golden / "discriminator" / "gan_losses.npz")
    real, fake = jnp.asarray(z["logits_real"]), jnp.asarray(z["logits_fake"])
    for name, loss in adversarial.DISCRIMINATOR.items():
        assert loss(real, fake) == pytest.approx(float(z[f"{name}_d_mean"]), abs=2e-6)
    assert adversarial.GENERATOR["vanilla"](fake) == pytest.approx(float(z["vanilla_g_mean"]), abs=2e-6)
    logits = jnp.array([[0.0, 3.0, -200.0]])
    np.testing.assert_allclose(adversarial.non_saturating_generator(logits) * 3, np.log(2) + np.log1p(np.exp(-3)) + 200)
    gradient = jax.grad(adversarial.non_saturating_generator)(logits)
    np.testing.assert_allclose(gradient[0, 2], -1 / 3, rtol=1e-6)  # where the loss -softplus is flat
    # LeCam is zero while logits do not pass the mean of the other class, and quadratic beyond it.
    real, fake = jnp.array([[1.0, 2.0]]), jnp.array([[-1.0, -3.0]])
    assert adversarial.lecam(real, fake, jnp.asarray(-3.0), jnp.asarray(2.0)) == 0
    assert adversarial.lecam(real, fake, jnp.asarray(0.0), jnp.asarray(0.5)) == pytest.approx((0.25 + 2.25) / 2 + 5)


def test_adaptive_weight_equals_pytorch(golden):
    z = np.load(golden / "adaptive_weight.npz")
    for case in ("normal", "clamped", "zero_gan", "zero_recon", "small_max", "tiny_gan_below_max"):
        gradients = (jnp.asarray(z[f"{case}__{name}_grads"]) for name in ("recon", "gan"))
        weight = adversarial.adaptive_weight(*gradients, float(z[f"{case}__max_d_weight"]))
        np.testing.assert_allclose(weight, z[f"{case}__d_weight"], rtol=1e-6, err_msg=case)


def test_augmentation_equals_pytorch(golden, assert_close):
    z = {name: jnp.asarray(x) for name, x in np.load(golden / "discriminator" / "diffaug.npz").items()}
    for case, probability, cutout in (("p1_cut0", 1.0, 0.0), ("p1_cut03", 1.0, 0.3), ("p05_cut02", 0.5, 0.2)):
        gates, uniform = z[f"{case}_gate"] <= probability, z[f"{case}_rand01"][..., 0, 0]
        augmented = jax.jit(apply_augmentations, static_argnums=3)(z["images"], gates, uniform, cutout)
        assert_close(augmented, z[f"{case}_out"], 1e-5, case)


def test_augmentation_is_a_function_of_its_key():
    image = jax.random.uniform(jax.random.key(0), (4, 16, 16, 3))

    @functools.partial(jax.jit, static_argnames="probability")
    def run(image, key, probability=1.0):
        return augment(image, jax.random.key(key), probability, cutout=0.25)

    a, b, other = (run(image, key) for key in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - other).max() > 0.1
    np.testing.assert_allclose(run(image, 1, 0.0), image, atol=1e-6)
    gradient = jax.grad(lambda x: (run(x, 1) ** 2).sum())(image)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0
