"""The DINO discriminator equals PyTorch's; spectral norm and PatchGAN follow their definitions."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from vqrae_jax.errors import WeightsError
from vqrae_jax.losses.adversarial import hinge_discriminator
from vqrae_jax.models.discriminator import SPECTRAL, DinoDiscriminator, PatchDiscriminator, SpectralConv
from vqrae_jax.models.vit import BlocksConfig, ViTConfig
from vqrae_jax.pretrained.judge_weights import convert_dino, read_dino

MODULES = {"0.0": "narrow/conv", "0.1": "narrow/norm", "1.fn.0": "wide/conv", "1.fn.1": "wide/norm", "2": "conv_out"}


def path_of(name):
    """Converts heads.1.0.0.weight_orig to (head1, narrow, conv, kernel)."""
    _, head, rest = name.split(".", 2)
    module, leaf = rest.rsplit(".", 1)
    weight = "scale" if MODULES[module].endswith("norm") else "kernel"
    leaf = {"weight": weight, "weight_orig": "kernel", "weight_u": "u", "weight_v": "v", "bias": "bias"}[leaf]
    return (f"head{head}", *MODULES[module].split("/"), leaf)


def heads(tensors, kernels):
    """Converts PyTorch's tensors of the heads to trees of params and vectors; `kernels` has the shapes."""
    params, vectors = {}, {}
    for name, tensor in tensors.items():
        path = path_of(name)
        if path[-1] == "kernel":
            tensor = tensor.transpose(2, 1, 0)
        if path[-1] == "v":  # PyTorch flattens channels first, then the window
            window, channels, _ = kernels[(*path[:-1], "kernel")].shape
            tensor = tensor.reshape(channels, window).T.ravel()
        (vectors if path[-1] in "uv" else params)[path] = tensor
    return unflatten_dict(params), unflatten_dict(vectors)


def read(golden, case):
    folder = golden / "discriminator"
    description = json.loads((folder / "config.json").read_text())[case]
    arch, recipe = description["arch"], description["recipe"]
    file = folder / f"dino_{case[:2]}.npz"
    fields, tensors = read_dino(str(file), "adversary.path", recipe["num_heads"])
    assert fields["patch"] == recipe["patch_size"]
    assert fields["blocks"]["mlp"] == recipe["embed_dim"] * recipe["mlp_ratio"]
    trunk = ViTConfig(BlocksConfig(**fields.pop("blocks")), **fields)
    norm = {"bn": "batch", "gn": "group"}[arch["norm_type"]]
    settings = tuple(arch["key_depths"]), arch["ks"], norm, arch["norm_eps"], arch["using_spec_norm"]
    module = DinoDiscriminator(trunk, *settings)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    params, vectors = heads(dict(np.load(folder / f"{case}_state.npz")), flatten_dict(shapes["params"]))
    params["trunk"] = convert_dino(tensors, shapes["params"]["trunk"], str(file))
    variables = {"params": params} | ({SPECTRAL: vectors} if vectors else {})
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes)
    return module, variables, np.load(folder / f"{case}.npz"), flatten_dict(shapes["params"])


def rms(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


CASES = "bn_sn", "bn_nosn", "gn_sn", "gn_nosn"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_other_sizes_and_a_trunk_in_bfloat16_equal_pytorch(golden, assert_close, case):
    module, variables, recorded, _ = read(golden, case)
    images = np.load(golden / "discriminator" / "images.npz")
    assert_close(jax.jit(module.apply)(variables, images["images_224"]), recorded["logits_eval_224"], 2e-5)
    blocks = dataclasses.replace(module.trunk.blocks, dtype="bfloat16")
    half = module.clone(trunk=dataclasses.replace(module.trunk, blocks=blocks))
    assert rms(jax.jit(half.apply)(variables, images["images_64"]), recorded["logits_eval_64"]) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_equals_pytorch(golden, assert_close, case):
    module, variables, recorded, kernels = read(golden, case)
    images = np.load(golden / "discriminator" / "images.npz")
    fake, real = jnp.asarray(images["images_64"]), jnp.asarray(images["real_64"])

    def generator(image, variables):
        logits = module.apply(variables, image)
        return -logits.mean(), logits

    evaluate = jax.jit(jax.value_and_grad(generator, has_aux=True))
    (loss, logits), gradient = evaluate(fake, variables)
    assert_close(logits, recorded["logits_eval_64"], 2e-5)
    assert loss == pytest.approx(float(recorded["g_loss"]), abs=2e-6)
    assert rms(gradient / 2, recorded["grad_images_64"]) <= 1e-3  # recorded for images in [-1, 1]

    train = functools.partial(module.apply, train=True, mutable=[SPECTRAL])

    def discriminate(params, state):  # reconstructions first, then images
        logits_fake, state = train({**state, "params": params}, fake)
        logits_real, state = train({**state, "params": params}, real)
        return hinge_discriminator(logits_real, logits_fake), (logits_fake, logits_real, state)

    logits, state = jax.jit(train)(variables, fake)
    assert_close(logits, recorded["logits_train_64"], 2e-5)
    step = jax.jit(jax.value_and_grad(discriminate, has_aux=True))
    (loss, (logits_fake, logits_real, after)), grads = step(variables["params"], state)
    assert_close(logits_fake, recorded["d_logits_fake"], 2e-5)
    assert_close(logits_real, recorded["d_logits_real"], 2e-5)
    assert loss == pytest.approx(float(recorded["d_loss"]), abs=2e-6)
    for prefix, vectors in (("after1__", state), ("after3__", after)):
        expected = {n.removeprefix(prefix): recorded[n] for n in recorded.files if n.startswith(prefix)}
        for path, value in flatten_dict(heads(expected, kernels)[1]).items():
            assert_close(flatten_dict(vectors[SPECTRAL])[path], value, 1e-5, f"{prefix}{path}")
    expected = {n.removeprefix("grad__"): recorded[n] for n in recorded.files if n.startswith("grad__")}
    for path, value in flatten_dict(heads(expected, kernels)[0]).items():
        actual = flatten_dict(grads)[path]
        if path[-1] == "bias" and "conv" in path and case.startswith("bn"):
            assert np.abs(actual).max() <= 1e-7, path  # the normalization removes a bias
        else:
            assert rms(actual, value) <= 1e-3, path


def test_power_iteration_converges_to_the_largest_singular_value():
    module, x = SpectralConv(5, (3,)), jnp.ones((1, 7, 4))
    variables = module.init(jax.random.key(0), x)
    matrix = np.asarray(variables["params"]["kernel"]).reshape(-1, 5)
    for _ in range(50):
        y, state = module.apply(variables, x, train=True, mutable=[SPECTRAL])
        variables = {**variables, **state}
    plain = SpectralConv(5, (3,), spectral=False).apply({"params": variables["params"]}, x)
    np.testing.assert_allclose(y * np.linalg.norm(matrix, 2), plain, rtol=1e-4)
    np.testing.assert_array_equal(module.apply(variables, x), module.apply(variables, x))  # eval changes nothing


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_patchgan_judges_images_independently_and_its_initialization_does_not_iterate(norm):
    module = PatchDiscriminator(4, 2, norm)
    images = jax.random.uniform(jax.random.key(1), (3, 32, 32, 3))
    init = jax.jit(module.init, static_argnames="train")
    variables, trained = (init(jax.random.key(0), images, train=train) for train in (False, True))
    jax.tree.map(np.testing.assert_array_equal, trained, variables)
    logits = jax.jit(module.apply)(variables, images)
    assert logits.shape == (3, 8 * 8)
    np.testing.assert_allclose(jax.jit(module.apply)(variables, images[1:2])[0], logits[1], rtol=2e-5, atol=1e-7)
    half = jax.jit(PatchDiscriminator(4, 2, norm, dtype="bfloat16").apply)(variables, images)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, logits, atol=0.05 * np.abs(logits).max())


def test_other_files_are_refused(tmp_path, golden):
    file = tmp_path / "other.npz"
    np.savez(file, weight=np.zeros(3))
    with pytest.raises(WeightsError, match=r"adversary\.path='.*other\.npz'"):
        read_dino(str(file), "adversary.path")
    with pytest.raises(WeightsError, match=r"width of 32.*5"):
        read_dino(str(golden / "discriminator" / "dino_bn.npz"), "adversary.path", 5)


def test_files_with_names_of_transformers_hold_the_same_network(golden, tmp_path):
    fields, tensors = read_dino(str(golden / "discriminator" / "dino_bn.npz"), "adversary.path", 2)
    names = {
        "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection", "blocks": "encoder.layer", "norm.": "layernorm.",
        "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    }  # fmt: skip
    hub = {}
    for name, tensor in tensors.items():
        for old, new in names.items():
            name = name.replace(old, new) if old != "norm." or name.startswith("norm.") else name
        if "attn.qkv" in name:
            for part, value in zip(("query", "key", "value"), np.split(tensor, 3), strict=True):
                hub[name.replace("attn.qkv", f"attention.attention.{part}")] = value
        else:
            hub[name] = tensor
    hub = {f"dino._orig_mod.{name}": tensor for name, tensor in hub.items()}  # a compiled part of a discriminator
    np.savez(tmp_path / "hub.npz", **hub, **{"pooler.dense.bias": np.zeros(32)})
    again, renamed = read_dino(str(tmp_path / "hub.npz"), "adversary.path", 2)
    assert again == fields
    trunk = ViTConfig(BlocksConfig(**fields.pop("blocks")), **fields)
    module = DinoDiscriminator(trunk, (1,))
    target = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]["trunk"]
    a, b = (convert_dino(t, target, "") for t in (tensors, renamed))
    jax.tree.map(np.testing.assert_array_equal, a, b)
