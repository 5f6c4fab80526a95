import functools
import pathlib
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import vqrae_jax
from vqrae_jax import Tokenizer, sharding
from vqrae_jax.build.tokenizer import build_tokenizer, initial_variables, variable_shapes
from vqrae_jax.config import ModelConfig
from vqrae_jax.data import images as image_files
from vqrae_jax.errors import CheckpointError, ConfigError, DataError, StorageError, WeightsError
from vqrae_jax.inference import inputs
from vqrae_jax.inference.batching import Programs


@pytest.fixture(scope="module")
def tokenizer(trained):
    return Tokenizer.load(trained)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(size=(3, 32, 32, 3)).astype(np.float32)


def test_shapes_ranges_and_properties(tokenizer, images):
    assert (tokenizer.grid, tokenizer.downsampling, tokenizer.code_dtype) == (4, 8, np.uint16)
    assert (tokenizer.bits_per_image, tokenizer.image_size) == (4 * 4 * 5, 32)
    assert repr(tokenizer) == "Tokenizer(image_size=32, code_shape=(4, 4), codebook_size=32, encoder_dtype=float32)"
    indices = tokenizer.encode_to_indices(images)
    assert (indices.shape, indices.dtype) == ((3, *tokenizer.code_shape), np.int32) == ((3, 4, 4), np.int32)
    assert 0 <= indices.min() <= indices.max() < tokenizer.codebook_size == 32
    decoded = tokenizer.decode_from_indices(indices)
    assert decoded.shape == (3, 32, 32, 3)
    assert 0 <= decoded.min() <= decoded.max() <= 1
    np.testing.assert_array_equal(tokenizer.reconstruct(images), decoded)
    np.testing.assert_array_equal(tokenizer.lookup(indices), tokenizer.encode(images))
    np.testing.assert_allclose(tokenizer.decode(tokenizer.encode(images)), decoded, atol=1e-5)
    assert tokenizer.encode_to_indices(np.zeros((0, 32, 32, 3), np.uint8)).shape == (0, 4, 4)
    assert tokenizer.decode_from_indices(np.zeros((0, 4, 4), np.int64)).shape == (0, 32, 32, 3)
    stream = tokenizer.stream("encode_to_indices", iter([images[:2], images[1:]]))
    for result, expected in zip(stream, (indices[:2], indices[1:]), strict=True):
        np.testing.assert_array_equal(result, expected)


def test_images_of_any_kind_and_size(tokenizer, images):
    encode, same = tokenizer.encode_to_indices, np.testing.assert_array_equal
    as_bytes, rng = (images * 255).astype(np.uint8), np.random.default_rng(1)
    same(encode(as_bytes), encode(jnp.asarray(as_bytes) / 255))
    assert encode(np.zeros((2, 50, 40, 3), np.uint8)).shape == (2, 4, 4)
    assert encode(jnp.zeros((1, 32, 32, 3), jnp.bfloat16)).shape == (1, 4, 4)
    arrays = [rng.integers(0, 256, size, np.uint8) for size in ((32, 32, 3), (70, 50, 3), (20, 41, 3))]
    expected = encode(np.stack([image_files.center_crop(x, 32) for x in arrays]))
    pil = [Image.fromarray(x) for x in arrays]
    for mixed in (arrays, pil, [pil[0], arrays[1], jnp.asarray(arrays[2])]):
        same(encode(mixed), expected)
    same(encode(pil[1]), expected[1:2])
    gray = arrays[0][..., 0]
    same(encode(Image.fromarray(gray)), encode(gray[None, ..., None].repeat(3, -1)))
    with pytest.raises(DataError, match=r"images\[1\].*\(32, 32\)"):
        encode([arrays[0], gray])


@pytest.fixture
def compilations(monkeypatch):
    """(method, shape, dtype) of each program compiled so far."""
    keys = []
    compile_program = Programs._compile

    def record(self, *key):
        before = len(self._compiled)
        program = compile_program(self, *key)
        keys.extend([key] * (len(self._compiled) - before))
        return program

    monkeypatch.setattr(Programs, "_compile", record)
    return keys


def test_few_sizes_are_compiled(trained, images, compilations):
    """Encoders have one size; sizes of other batches are powers of two, or the fixed one."""
    many = np.concatenate([images] * 30)
    free, fixed = Tokenizer.load(trained), Tokenizer.load(trained, batch_size=4)
    indices = fixed.encode_to_indices(many)
    for count in (1, 2, 3, 4, 5, 70, 80, 90):
        np.testing.assert_array_equal(fixed.encode_to_indices(many[:count]), indices[:count])
    assert [key[1][0] for key in compilations] == [1]
    compilations.clear()
    expected = fixed.lookup(indices)
    for count in (1, 5, 90):
        np.testing.assert_array_equal(fixed.lookup(indices[:count]), expected[:count])
    assert [key[1][0] for key in compilations] == [4]
    for count in (3, 4, 64, 65, 90):
        np.testing.assert_array_equal(free.lookup(indices[:count]), expected[:count])
    assert [key[1][0] for key in compilations] == [4, 4, 64]


@pytest.mark.slow
def test_batches_shrink_to_the_memory_limit(trained, images, compilations):
    tokenizer = Tokenizer.load(trained)
    many = np.concatenate([tokenizer.encode_to_indices(images)] * 22)
    compilations.clear()
    whole = tokenizer.decode_from_indices(many)
    needed = tokenizer._programs._compile(*compilations[0]).memory_analysis().temp_size_in_bytes
    compilations.clear()
    limited = Tokenizer.load(trained, memory_limit=needed // 4)
    np.testing.assert_allclose(limited.decode_from_indices(many), whole, atol=1e-5)
    assert compilations[0][1][0] == 64
    assert compilations[-1][1][0] <= 16
    used = limited._programs._compile(*compilations[-1]).memory_analysis().temp_size_in_bytes
    assert used <= needed // 4 or compilations[-1][1][0] == 1


@pytest.fixture(scope="module")
def low(golden):
    """A function that builds a tokenizer with 196 latents, enough for XLA to round large batches in other ways.

    With `tokens` they become that many codes; with a mesh, that of the options, it is also built for it.
    """
    architecture = {
        "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4, "image_size": 56,
    }  # fmt: skip

    @functools.cache
    def initial(tokens):
        config = ModelConfig(
            encoder_config_path=None, encoder_params={"architecture": architecture}, encoder_input_size=56,
            decoder_config_path=str(golden / "vqrae" / "decoder_config"), decoder_patch_size=2, num_embeddings=64,
            dtype="bfloat16", resampler_tokens=tokens,
        )  # fmt: skip
        variables = initial_variables(build_tokenizer(config), jax.random.key(0), ["encoder", "quantizer", "decoder"])
        embed = variables["params"]["encoder"]["vit"]["patch_embed"]
        embed["bias"] = jnp.zeros_like(embed["bias"])  # spreads the latents over the random codes
        return config, jax.device_get(variables)

    def build(tokens=0, **options):
        config, variables = initial(tokens)
        module = build_tokenizer(config, mesh=options.get("mesh")).module
        return Tokenizer(module, variables, config, **options)

    return build


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_codes_depend_on_neither_batch_nor_mesh(low, dtype):
    """Bit for bit. In bfloat16 a direct call with 16 images gives codes other than one with single images."""
    images = np.random.default_rng(0).integers(0, 256, (16, 28, 28, 3)).astype(np.uint8)
    tokenizer, same = low(encoder_dtype=dtype), np.testing.assert_array_equal
    assert tokenizer.encoder_dtype == tokenizer.module.encoder.vit.blocks.dtype == dtype
    assert tokenizer.module.decoder.blocks.dtype == "bfloat16"
    expected = tokenizer.encode_to_indices(images)
    assert len(np.unique(expected)) > 16
    for size in (1, 3, 8):
        same(np.concatenate([tokenizer.encode_to_indices(images[i : i + size]) for i in range(0, 16, size)]), expected)
    same(tokenizer.encode_to_indices(images / np.float32(255)), expected)
    order = np.random.default_rng(1).permutation(16)
    same(tokenizer.encode_to_indices(images[order]), expected[order])
    same(tokenizer.encode(images), tokenizer.lookup(expected))
    for ways in ((8, 1), (4, 2)):
        other = low(encoder_dtype=dtype, mesh=sharding.make_mesh(*ways), output="jax")
        same(other.encode_to_indices(images[:11]), expected[:11])


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_tokens_that_are_free_of_the_grid_have_the_dtype_of_the_encoder_on_any_mesh(low, dtype):
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 3)).astype(np.uint8)
    tokenizer = low(16, encoder_dtype=dtype)
    assert tokenizer.module.quantizer.blocks.dtype == dtype
    expected = tokenizer.encode_to_indices(images)
    assert expected.shape == (5, 16)
    assert len(np.unique(expected)) > 8
    for ways in ((1, 2), (2, 2)):
        sharded = low(16, encoder_dtype=dtype, mesh=sharding.make_mesh(*ways, jax.devices()[: np.prod(ways)]))
        np.testing.assert_array_equal(sharded.encode_to_indices(images), expected)


def test_dtype_is_part_of_the_hash(low):
    hashes = {dtype: low(encoder_dtype=dtype).hash for dtype in ("bfloat16", "float32")}
    assert hashes["bfloat16"] != hashes["float32"] == low().hash
    assert low().encoding == "float32"
    assert low(encoder_dtype="bfloat16").encoding.startswith("bfloat16, 1 images per program and device, ")


@pytest.mark.parametrize("mesh", [
    pytest.param({"data": 4, "model": 2}, id="one", marks=pytest.mark.slow),
    pytest.param({"data": 2, "model": 2, "slices": 2}, id="slices"),
])  # fmt: skip
def test_on_a_mesh(tokenizer, trained, images, mesh):
    mesh = sharding.make_mesh(**mesh)
    sharded = Tokenizer.load(trained, mesh=mesh)
    np.testing.assert_array_equal(sharded.encode_to_indices(images), tokenizer.encode_to_indices(images))
    np.testing.assert_allclose(sharded.reconstruct(images), tokenizer.reconstruct(images), atol=1e-5)
    assert sharded.hash == tokenizer.hash
    with pytest.raises(ConfigError, match=r"batch_size=6: .* 4"):
        Tokenizer.load(trained, mesh=mesh, batch_size=6)


def test_pytorch_tensors(tokenizer, images):
    torch = pytest.importorskip("torch")
    encode, same = tokenizer.encode_to_indices, np.testing.assert_array_equal
    tensor, expected = torch.tensor(images), encode(images)
    same(encode(tensor.requires_grad_()), expected)
    same(encode(list(tensor)), expected)
    same(tokenizer.decode_from_indices(torch.tensor(expected)), tokenizer.reconstruct(images))
    latents = tokenizer.encode(images)
    same(tokenizer.decode(torch.tensor(latents, requires_grad=True)), tokenizer.decode(latents))
    rounded = tensor.bfloat16()
    same(encode(rounded), encode(rounded.detach().float().numpy()))


def test_fit_model_and_jax_output(trained):
    tokenizer = Tokenizer.load(trained, fit="model", output="jax")
    images = np.random.default_rng(2).uniform(size=(2, 40, 24, 3))
    direct = jax.jit(tokenizer.function("encode_to_indices"))(tokenizer.variables, images.astype(np.float32))
    np.testing.assert_array_equal(tokenizer.encode_to_indices(images), direct)
    assert isinstance(tokenizer.encode_to_indices(images), jax.Array)
    mixed = tokenizer.encode_to_indices([images[0, :, 1:], images[1]])  # of any sizes, each as by itself
    np.testing.assert_array_equal(mixed[1], direct[1])
    np.testing.assert_array_equal(mixed[0], tokenizer.encode_to_indices(images[:1, :, 1:])[0])
    assert tokenizer.fit_images(images[:1], decoded=True).shape == (1, 32, 32, 3)


def refit(tokenizer, fit="keep", **options):
    module = build_tokenizer(tokenizer.config, weights=False).module  # with the position grid of the file
    return Tokenizer(module, tokenizer.trained, tokenizer.config, fit=fit, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields", [{}, {"quantizer": "none"}, {"quantizer": "residual", "decoder_head": "overlap"}], ids=str
)
def test_proportions_are_kept(untrained, fields):
    square, images = untrained(**fields), np.random.default_rng(3).integers(0, 256, (2, 40, 62, 3), np.uint8)
    tokenizer, same = refit(square), np.testing.assert_array_equal
    latents, decoded = tokenizer.encode(images), tokenizer.reconstruct(images)
    assert (latents.shape[:3], decoded.shape) == ((2, 4, 6), (2, 32, 48, 3))
    np.testing.assert_allclose(tokenizer.decode(latents), decoded, atol=1e-5)
    if square.has_codes:
        indices = tokenizer.encode_to_indices(images)
        assert indices.shape == (2, 4, 6, *square.code_shape[2:])
        same(tokenizer.lookup(indices), latents)
        same(tokenizer.decode_from_indices(indices), decoded)
        if square.module.quantizer.prefixes:
            assert tokenizer.decode_from_indices(indices[..., :1]).shape == decoded.shape
    stretched = refit(square, fit="stretch")
    same(tokenizer.encode(images[:, :, :40]), stretched.encode(images[:, :, :40]))
    same(tokenizer.decode(latents[:, :, :4]), stretched.decode(latents[:, :, :4]))
    assert not square.has_codes or tokenizer.hash == square.hash


@pytest.mark.slow
def test_codes_of_rectangles_depend_on_neither_batch_nor_mesh(untrained):
    images = np.random.default_rng(0).integers(0, 256, (11, 64, 32, 3), np.uint8)
    tokenizer = refit(untrained())
    expected = tokenizer.encode_to_indices(images)
    assert expected.shape == (11, 8, 4)
    np.testing.assert_array_equal(tokenizer.encode_to_indices([images[3], images[1]]), expected[[3, 1]])
    direct = jax.jit(tokenizer.function("encode_to_indices"))(tokenizer.variables, images / np.float32(255))
    assert (direct == expected).mean() > 0.99
    sharded = refit(untrained(), mesh=sharding.make_mesh(4, 2))
    np.testing.assert_array_equal(sharded.encode_to_indices(images), expected)
    np.testing.assert_allclose(sharded.reconstruct(images), tokenizer.reconstruct(images), atol=1e-5)


@pytest.mark.parametrize(("cell", "shape", "expected"), [
    (8, (100, 150), (32, 48)), (8, (150, 100), (48, 32)), (8, (100, 400), (32, 128)), (8, (100, 113), (32, 40)),
    (8, (100, 112), (32, 32)), (2, (7, 7), (32, 32)), (1, (99, 99), (32, 32)),
])  # fmt: skip
def test_sides_are_multiples_of_cells(cell, shape, expected):
    image = np.full((*shape, 3), 0.25, np.float32)
    fitted = inputs.fit_image(image, 32, "keep", (1.0, 1.0, 1.0), cell)
    assert fitted.shape[:2] == expected
    np.testing.assert_allclose(fitted, 0.25, atol=1e-5)


@pytest.mark.slow
def test_what_does_not_keep_its_proportions(untrained, tmp_path):
    tokenizer = refit(untrained())
    images = [np.zeros((*shape, 3), np.uint8) for shape in ((32, 48), (64, 96), (32, 40))]
    assert tokenizer.fit_images(images[:2]).shape == (2, 32, 48, 3)
    with pytest.raises(DataError, match=r"images\[2\].*32 x 40"):
        tokenizer.encode(images)
    with pytest.raises(DataError, match="4:1; crop"):
        tokenizer.encode(np.zeros((1, 32, 129, 3), np.uint8))
    for shape in ((1, 16), (1, 4, 17), (1, 5, 5), (1, 3, 4)):
        with pytest.raises(DataError):
            tokenizer.decode_from_indices(np.zeros(shape, int))
        with pytest.raises(DataError):
            tokenizer.decode(np.zeros((*shape, 36)))
    with pytest.raises(DataError):
        untrained().decode_from_indices(np.zeros((1, 4, 6), int))
    np.savez(tmp_path / "stat.npz", var=np.ones((4, 4, 36), np.float32))
    for fields in (
        {"quantize_before_reshape": True}, {"reshape_to_2d": False}, {"quantizer": "multiscale"},
        {"normalization_stat_path": str(tmp_path / "stat.npz")},
    ):  # fmt: skip
        built = build_tokenizer(untrained().config.model_copy(update=fields), weights=False)
        with pytest.raises(ConfigError) as caught:
            Tokenizer(built.module, variable_shapes(built), fit="keep")
        assert (caught.value.field, caught.value.value) == ("fit", "keep")


@pytest.mark.slow
def test_the_use_on_a_card_is_the_mean_over_groups(untrained, tmp_path):
    tokenizer = untrained(quantizer="product")
    images = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    tokenizer.save_pretrained(tmp_path, images)
    groups = tokenizer.encode_to_indices(images).reshape(-1, tokenizer.code_shape[-1]).T
    use = np.mean([len(np.unique(codes)) / tokenizer.codebook_size for codes in groups])
    assert f"codebook usage on these images | {use:.1%} |" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
def test_a_card_and_a_first_codebook_of_rectangles(untrained, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 62, 3), np.uint8)
    refit(untrained()).save_pretrained(tmp_path, images)
    assert (tmp_path / "README.md").is_file()
    started = Tokenizer.from_config(untrained().config, images=images, fit="keep")
    assert started.encode_to_indices(images).shape == (2, 4, 6)


@pytest.mark.parametrize(("field", "value"), [
    ("fit", "Crop"), ("output", "torch"), ("encoder_dtype", "float16"), ("batch_size", 0), ("batch_size", 1.5),
    ("memory_limit", "8GB"), ("memory_limit", -1), ("mesh", 8),
])  # fmt: skip
@pytest.mark.usefixtures("unchecked_types")
def test_invalid_option_is_refused_before_anything_is_read(field, value):
    with pytest.raises(ConfigError) as caught:
        Tokenizer.load("missing folder", **{field: value})
    assert (caught.value.field, caught.value.value) == (field, value)


@pytest.mark.parametrize("path", [None, 5])
@pytest.mark.usefixtures("unchecked_types")
def test_what_is_not_a_path_is_refused(untrained, path):
    calls = {
        "checkpoint": lambda: Tokenizer.load(path),
        "encoder": lambda: Tokenizer.load("absent", encoder=5),
        "folder": lambda: untrained().save_pretrained(path),
    }
    for field, call in calls.items():
        with pytest.raises(ConfigError) as caught:
            call()
        assert caught.value.field == field


def test_pure_functions(tokenizer, images):
    """They can be compiled, and differentiated: a gradient step on the latent reduces the error."""
    encode, decode = tokenizer.function("encode"), tokenizer.function("decode")
    latent = jax.jit(encode)(tokenizer.variables, images)
    np.testing.assert_allclose(latent, tokenizer.encode(images), atol=1e-5)

    @jax.jit
    def error(latent):
        return jnp.mean((decode(tokenizer.variables, latent) - images) ** 2)

    before, gradient = jax.jit(jax.value_and_grad(error))(latent)
    assert error(latent - 1e-2 * gradient / jnp.linalg.norm(gradient)) < before
    with pytest.raises(ConfigError, match="method='render'"):
        tokenizer.function("render")


def test_saved_and_loaded(tokenizer, images, tmp_path):
    folder = tokenizer.save_pretrained(tmp_path / "a tokenizer ü", images)
    again = Tokenizer.from_pretrained(folder)
    np.testing.assert_array_equal(again.encode_to_indices(images), tokenizer.encode_to_indices(images))
    assert again.hash == tokenizer.hash
    assert again.provenance["step"] == 3
    assert again.provenance["metrics"].keys() >= {"eval/psnr"}
    card = (folder / "README.md").read_text()
    for words in ("library_name: vqrae_jax", "16 codes of 32", "PSNR on 3 images", "| psnr | ", again.hash):
        assert words in card
    assert "random weights" in card  # no pretrained encoder
    assert image_files.read_image(folder / "reconstructions.png").ndim == 3
    with pytest.raises(ConfigError) as caught:
        Tokenizer.load(folder, step=3)
    assert caught.value.field == "step"
    with pytest.raises(StorageError) as caught:
        again.save_pretrained(folder / "README.md")
    assert caught.value.field == "folder"
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "twice" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_built_from_a_config(untrained, images):
    """Random, the parts equal those of any new model; from images, the codebook starts as training starts it."""
    expected = untrained()
    config = expected.config
    tokenizer = Tokenizer.from_config(config)
    assert tokenizer.hash == expected.hash
    fitted = Tokenizer.from_config(config.model_dump(), images, output="jax")
    state = fitted.variables["batch_stats"]["quantizer"]
    assert state["step"] == 1
    indices = fitted.encode_to_indices(images)
    distance = np.square(np.asarray(fitted.encode(images)) - latents(fitted, images)).mean()
    assert distance < 0.5 * np.square(expected.encode(images) - latents(expected, images)).mean()
    assert len(np.unique(indices)) == config.num_embeddings
    with pytest.raises(DataError, match="images"):
        Tokenizer.from_config(config, images[:0])
    with pytest.raises(ConfigError, match="num_embeddings"):
        Tokenizer.from_config({"num_embedding": 8})


def latents(tokenizer, images):
    """Returns the encoder's output."""
    apply = jax.jit(functools.partial(tokenizer.module.apply, method=lambda m, x: m.encoder(x)))
    return np.asarray(apply(tokenizer.variables, images))


def test_public_names():
    names = ["Generator", "ModelConfig", "Tokenizer", "VQRAE", "__version__"]
    assert dir(vqrae_jax) == sorted(vqrae_jax.__all__) == names
    for name in vqrae_jax.__all__:
        assert getattr(vqrae_jax, name) is not None
    with pytest.raises(TypeError, match=r"Tokenizer\.from_config\(ModelConfig\("):
        vqrae_jax.VQRAE(encoder_cls="Dinov2withNorm", num_embeddings=8192)


def test_hash_depends_on_codes_and_not_on_the_decoder(tokenizer):
    shifted = jax.tree.map(lambda x: x + 1, tokenizer.trained)

    def changed(collection, part):
        variables = {**tokenizer.trained, collection: {**tokenizer.trained[collection]}}
        variables[collection][part] = shifted[collection][part]
        return Tokenizer(tokenizer.module, variables, tokenizer.config).hash

    assert changed("params", "decoder") == tokenizer.hash
    assert changed("params", "encoder") != tokenizer.hash
    assert changed("batch_stats", "quantizer") != tokenizer.hash
    statistics = [{**tokenizer.trained["batch_stats"], "latent": {"mean": np.full(16, x, np.float32)}} for x in (0, 1)]
    hashes = [
        Tokenizer(tokenizer.module, {**tokenizer.trained, "batch_stats": s}, tokenizer.config).hash for s in statistics
    ]
    assert len({tokenizer.hash, *hashes}) == 3
    with pytest.raises(DataError, match="config="):
        _ = Tokenizer(tokenizer.module, tokenizer.trained).hash


@pytest.mark.slow
def test_a_learned_fusion_decides_codes_and_is_saved(untrained, images, tmp_path):
    tokenizer = untrained(encoder_params={"layers": (0, -1), "fusion": "routed"})
    trained = jax.device_get(tokenizer.trained)
    trained["params"]["quantizer"]["fusion"]["router"]["bias"] = np.float32([9, -9])
    changed = Tokenizer(build_tokenizer(tokenizer.config).module, trained, tokenizer.config, frozen=True)
    assert changed.hash != tokenizer.hash
    codes = changed.encode_to_indices(images)
    assert np.any(codes != tokenizer.encode_to_indices(images))
    again = Tokenizer.load(changed.save_pretrained(tmp_path / "saved"))
    assert again.hash == changed.hash
    np.testing.assert_array_equal(again.encode_to_indices(images), codes)


def test_missing_tokenizer(tmp_path):
    with pytest.raises(WeightsError, match=r"^checkpoint='nobody/nothing'"):
        Tokenizer.load("nobody/nothing")
    with pytest.raises(CheckpointError, match="missing"):
        Tokenizer.load(tmp_path / "missing")


def test_push_to_hub(tokenizer, monkeypatch):
    """A client of the hub that loads what is uploaded."""
    import huggingface_hub

    uploaded = {}

    class Hub:
        def __init__(self, token):
            uploaded["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            uploaded["hash"] = Tokenizer.load(folder_path).hash
            uploaded["card"] = (pathlib.Path(folder_path) / "README.md").read_text()

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert tokenizer.push_to_hub("me/tokens", token="t").endswith("me/tokens")
    assert uploaded["hash"] == tokenizer.hash
    assert uploaded["token"] == "t"
    assert 'Tokenizer.load("me/tokens")' in uploaded["card"]
    monkeypatch.setattr(Hub, "create_repo", lambda *_, **__: 1 / 0)
    with pytest.raises(WeightsError, match=r"repo_id='me/tokens'.*ZeroDivisionError"):
        tokenizer.push_to_hub("me/tokens")


@pytest.mark.parametrize(("images", "message"), [
    (np.zeros((32, 32, 3), np.float32), r"\(32, 32, 3\).*images\[None\]"),
    (np.zeros((1, 3, 32, 32), np.float32), r"\(1, 3, 32, 32\).*images\.transpose\(0, 2, 3, 1\)"),
    (np.zeros((3, 32, 32), np.float32), r"\(3, 32, 32\)"),
    (np.zeros((1, 32, 32, 1), np.float32), r"images\.repeat\(3, axis=-1\)"),
    (np.zeros((1, 32, 32, 4), np.float32), r"images\[\.\.\., :3\]"),
    ("cat.png", "str.*PIL"),
    ([pathlib.Path("cat.png")], "Path"),
    (np.zeros((1, 32, 0, 3), np.float32), "shape"),
    (np.zeros((1, 32, 32, 3), np.int64), "int64"),
    (np.zeros((1, 32, 32, 3), bool), "bool"),
    (np.full((1, 32, 32, 3), 255.0), r"\[255, 255\].*divide by 255"),
    (np.full((1, 32, 32, 3), -0.1), r"\[-0\.1, -0\.1\]"),
    (np.full((1, 32, 32, 3), 1.0004), r"\[1\.0004, 1\.0004\].*clip"),
    (np.stack([np.zeros((32, 32, 3)), np.full((32, 32, 3), np.nan)]), r"images\[1\].*NaN"),
    (np.full((1, 32, 32, 3), np.inf), r"images\[0\].*infinity"),
    (np.full((1, 32, 32, 3), 1e300), r"images\[0\].*infinity"),
    ([np.zeros((32, 32, 3)), np.full((32, 32, 3), np.nan)], r"images\[1\].*NaN"),
    ([np.zeros((32, 32, 3)), np.zeros((32, 32, 4))], r"images\[1\].*4"),
    (jnp.full((1, 32, 32, 3), 3e38, jnp.bfloat16), "divide by 255"),
    (jnp.full((1, 32, 32, 3), jnp.nan, jnp.bfloat16), "NaN"),
    (np.zeros((1, 32, 32, 3), [("a", "f4")]), "f4"),
    (np.zeros((1, 32, 32, 3), "V2"), "V2"),
    (np.zeros((1, 32, 32, 3), jnp.int4), "int4"),
    ([[[1.0], [1.0, 2.0]]], "array"),
    ([np.zeros((1, 40_000, 3), np.float32)], "40000 pixels"),
])  # fmt: skip
def test_invalid_images(tokenizer, images, message):
    with pytest.raises(DataError, match=message):
        tokenizer.encode_to_indices(images)


@pytest.mark.parametrize(("indices", "message"), [
    (np.zeros((1, 4, 4), np.float32), "float32"),
    (np.zeros((1, 5, 4), np.int32), r"\(1, 5, 4\).*\[B, 4, 4\]"),
    (np.full((1, 4, 4), 32), r"\[32, 32\].*0 to 31"),
    (np.full((1, 4, 4), -1), r"\[-1, -1\]"),
])  # fmt: skip
def test_invalid_indices(tokenizer, indices, message):
    with pytest.raises(DataError, match=message):
        tokenizer.decode_from_indices(indices)


@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e300, 1j, "x"])
def test_invalid_latents(tokenizer, value):
    latents = np.zeros((2, *tokenizer.encode(np.zeros((1, 32, 32, 3), np.uint8)).shape[1:])).astype(type(value))
    latents[1, 0, 0, 0] = value
    with pytest.raises(DataError, match="latents"):
        tokenizer.decode(latents)


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1)])
def test_long_images_take_little_memory(shape):
    image = np.full((*shape, 3), 0.5, np.float32)
    for fit in ("crop", "pad", "stretch"):
        tracemalloc.start()
        square = inputs.fit_image(image, 64, fit, (0.5, 0.5, 0.5))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        np.testing.assert_allclose(square, 0.5, atol=1e-5)
        assert peak < 200e6


def test_large_images_are_not_copied(monkeypatch):
    """The matrices take as much as the image."""
    image = np.random.default_rng(0).integers(0, 256, (300, 4000, 3), np.uint8)
    expected = inputs.fit_image(image, 32, "stretch", (0.0, 0.0, 0.0))
    monkeypatch.setattr(inputs, "_STRIP", 300 * 100)
    tracemalloc.start()
    assert np.abs(inputs.fit_image(image, 32, "stretch", (0.0, 0.0, 0.0)).astype(int) - expected).max() <= 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * image.nbytes


@pytest.mark.parametrize(("quantizer", "digest"), [
    ("ema", "fc73e2afe998cb4a400fcfacc119e61b4f2b5e5a619ebf960725de4b7aef40e6"),
    ("simvq", "d20f815291127e48303640e39f1b5b63ff6b2f269a68fb262f10227587b72808"),
    ("fsq", "a36dc62b4e9250ad26ee793ce479d86855f440bdcad4bd926c46b9bc487c46ac"),
    ("residual", "d5606aeaf3dcd0b96c30e4e74fca3ead230450041aaa19a87b8ecf962f78e5fb"),
])  # fmt: skip
def test_hash_is_stable_across_versions(golden, quantizer, digest):
    """Datasets of codes record the hash, so it stays what commit 4884dca computed."""
    config = ModelConfig(
        encoder_config_path=str(golden / "encoders" / "dinov2"), encoder_input_size=56, decoder_patch_size=8,
        decoder_config_path=str(golden / "vqrae" / "decoder_config"), num_embeddings=24, quantizer=quantizer,
    )  # fmt: skip
    built = build_tokenizer(config)

    def fill(leaf):
        return (np.arange(leaf.size, dtype=np.float64) % 251 / 251).reshape(leaf.shape).astype(leaf.dtype)

    variables = jax.tree.map(fill, variable_shapes(built))
    variables["params"]["encoder"] = built.pretrained["encoder"]
    assert Tokenizer(built.module, variables, config, frozen=True).hash == digest
