import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vqrae_jax import Tokenizer, sharding
from vqrae_jax.data import images as image_files
from vqrae_jax.errors import CheckpointError, DataError, WeightsError
from vqrae_jax.inference import batching as programs


@pytest.fixture(scope="module")
def tokenizer(trained):
    return Tokenizer.load(trained)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(size=(3, 32, 32, 3)).astype(np.float32)


def test_codes_and_pictures(tokenizer, images):
    indices = tokenizer.encode_to_indices(images)
    assert indices.shape == (3, tokenizer.grid, tokenizer.grid) == (3, 4, 4)
    assert indices.dtype == np.int32
    assert 0 <= indices.min() <= indices.max() < tokenizer.codebook_size == 32
    pictures = tokenizer.decode_from_indices(indices)
    assert pictures.shape == (3, tokenizer.image_size, tokenizer.image_size, 3) == (3, 32, 32, 3)
    assert 0 <= pictures.min() <= pictures.max() <= 1
    np.testing.assert_allclose(tokenizer.reconstruct(images), pictures, atol=1e-5)
    np.testing.assert_allclose(tokenizer.decode(tokenizer.encode(images)), pictures, atol=1e-5)


def test_bytes_jax_arrays_and_other_sizes_are_taken(tokenizer, images):
    as_bytes = (images * 255).astype(np.uint8)
    np.testing.assert_array_equal(
        tokenizer.encode_to_indices(as_bytes), tokenizer.encode_to_indices(jnp.asarray(as_bytes) / 255)
    )
    assert tokenizer.encode_to_indices(np.zeros((2, 50, 40, 3), np.uint8)).shape == (2, 4, 4)
    assert tokenizer.encode_to_indices(jnp.zeros((1, 32, 32, 3), jnp.bfloat16)).shape == (1, 4, 4)


@pytest.fixture
def compilations(monkeypatch):
    """The programs compiled so far."""
    done = []
    compile_program = programs.Programs._program

    def counted(self, *key):
        before = len(self._compiled)
        program = compile_program(self, *key)
        done.extend([key] * (len(self._compiled) - before))
        return program

    monkeypatch.setattr(programs.Programs, "_program", counted)
    return done


def test_few_sizes_are_compiled(trained, images, compilations):
    """No other program runs on rows than those counted: powers of two by themselves, one size where it is given."""
    many = np.concatenate([images] * 30)
    free, fixed = Tokenizer.load(trained), Tokenizer.load(trained, batch_size=4)
    expected = fixed.encode_to_indices(many)
    for count in (1, 2, 3, 4, 5, 70, 80, 90):
        np.testing.assert_array_equal(fixed.encode_to_indices(many[:count]), expected[:count])
    assert [key[1][0] for key in compilations] == [4]
    for count in (3, 4, 64, 65, 90):
        np.testing.assert_array_equal(free.encode_to_indices(many[:count]), expected[:count])
    assert [key[1][0] for key in compilations] == [4, 4, 64]


def test_batches_shrink_to_the_memory_limit(trained, images, compilations):
    tokenizer = Tokenizer.load(trained)
    many = np.concatenate([images] * 22)
    whole = tokenizer.encode_to_indices(many)
    needed = tokenizer._programs._program(*compilations[0]).memory_analysis().temp_size_in_bytes
    compilations.clear()
    limited = Tokenizer.load(trained, memory_limit=needed // 4)
    np.testing.assert_array_equal(limited.encode_to_indices(many), whole)
    assert compilations[0][1][0] == 64
    assert compilations[-1][1][0] <= 16
    used = limited._programs._program(*compilations[-1]).memory_analysis().temp_size_in_bytes
    assert used <= needed // 4 or compilations[-1][1][0] == 1


@pytest.mark.parametrize("mesh", [{"data": 4, "model": 2}, {"data": 2, "model": 2, "slices": 2}], ids=["one", "slices"])
def test_on_a_mesh(trained, images, mesh):
    mesh = sharding.make_mesh(**mesh)
    one, spread = Tokenizer.load(trained), Tokenizer.load(trained, mesh=mesh)
    np.testing.assert_array_equal(spread.encode_to_indices(images), one.encode_to_indices(images))
    np.testing.assert_allclose(spread.reconstruct(images), one.reconstruct(images), atol=1e-5)
    assert spread.hash == one.hash
    with pytest.raises(DataError, match="batch_size=6: give a positive multiple of 4, the parts"):
        Tokenizer.load(trained, mesh=mesh, batch_size=6)


def test_reconstruct_is_decoding_the_codes_exactly(tokenizer, images):
    indices = tokenizer.encode_to_indices(images)
    np.testing.assert_array_equal(tokenizer.reconstruct(images), tokenizer.decode_from_indices(indices))
    np.testing.assert_array_equal(tokenizer.lookup(indices), tokenizer.encode(images))


def test_what_it_says_of_itself(tokenizer):
    assert (tokenizer.grid, tokenizer.downsampling, tokenizer.codebook_size) == (4, 8, 32)
    assert tokenizer.bits_per_image == 4 * 4 * 5
    assert tokenizer.code_shape == (4, 4)
    assert tokenizer.code_dtype == np.uint16
    assert repr(tokenizer) == "Tokenizer(image_size=32, code_shape=(4, 4), codebook_size=32)"


def test_pil_images_and_lists_of_any_sizes(tokenizer):
    rng = np.random.default_rng(1)
    arrays = [rng.integers(0, 256, size, np.uint8) for size in ((32, 32, 3), (70, 50, 3), (20, 41, 3))]
    expected = tokenizer.encode_to_indices(np.stack([image_files.center_crop(x, 32) for x in arrays]))
    pil = [Image.fromarray(x) for x in arrays]
    np.testing.assert_array_equal(tokenizer.encode_to_indices(arrays), expected)
    np.testing.assert_array_equal(tokenizer.encode_to_indices(pil), expected)
    np.testing.assert_array_equal(tokenizer.encode_to_indices([pil[0], arrays[1], jnp.asarray(arrays[2])]), expected)
    np.testing.assert_array_equal(tokenizer.encode_to_indices(pil[1]), expected[1:2])
    gray = Image.fromarray(arrays[0][..., 0])
    np.testing.assert_array_equal(
        tokenizer.encode_to_indices(gray), tokenizer.encode_to_indices(arrays[0][None, ..., :1].repeat(3, -1))
    )
    with pytest.raises(DataError, match=r"images\[1\] of the list has shape \(32, 32\)"):
        tokenizer.encode_to_indices([arrays[0], arrays[0][..., 0]])


def test_tensors_of_pytorch(tokenizer, images):
    torch = pytest.importorskip("torch")
    tensor, expected = torch.tensor(images), tokenizer.encode_to_indices(images)
    assert tensor.dtype == torch.float32
    np.testing.assert_array_equal(tokenizer.encode_to_indices(tensor.requires_grad_()), expected)
    np.testing.assert_array_equal(tokenizer.encode_to_indices(list(tensor)), expected)
    np.testing.assert_array_equal(tokenizer.decode_from_indices(torch.tensor(expected)), tokenizer.reconstruct(images))
    latents = torch.tensor(tokenizer.encode(images), requires_grad=True)
    np.testing.assert_array_equal(tokenizer.decode(latents), tokenizer.decode(tokenizer.encode(images)))
    rounded = tensor.bfloat16()
    np.testing.assert_array_equal(
        tokenizer.encode_to_indices(rounded), tokenizer.encode_to_indices(rounded.detach().float().numpy())
    )


def test_the_resizing_may_be_left_to_the_model(trained):
    tokenizer, pictures = Tokenizer.load(trained, fit="model"), np.random.default_rng(2).uniform(size=(2, 40, 24, 3))
    direct = tokenizer.function("encode_to_indices")(tokenizer.variables, pictures.astype(np.float32))
    np.testing.assert_array_equal(tokenizer.encode_to_indices(pictures), direct)
    with pytest.raises(DataError, match="images of one size at a time"):
        tokenizer.encode_to_indices([pictures[0], pictures[0, 1:]])


def test_nothing_in_nothing_out(tokenizer):
    assert tokenizer.encode_to_indices(np.zeros((0, 32, 32, 3), np.uint8)).shape == (0, 4, 4)
    assert tokenizer.decode_from_indices(np.zeros((0, 4, 4), np.int64)).shape == (0, 32, 32, 3)


def test_results_may_stay_on_the_device(trained, images):
    tokenizer = Tokenizer.load(trained, output="jax")
    assert isinstance(tokenizer.reconstruct(images), jax.Array)
    assert tokenizer.reconstruct(images).shape == (3, 32, 32, 3)


@pytest.mark.parametrize(
    ("option", "accepted"),
    [
        ({"fit": "Crop"}, "fit='Crop': give one of 'crop', 'pad', 'stretch', 'model'"),
        ({"fit": "center"}, "fit='center': give one of 'crop'"),
        ({"output": "torch"}, "output='torch': give one of 'numpy', 'jax'"),
        ({"batch_size": 0}, "batch_size=0: give a positive multiple of 1"),
        ({"batch_size": 1.5}, "batch_size=1.5: give a positive multiple of 1"),
        ({"memory_limit": "8GB"}, "memory_limit='8GB': give a number of bytes"),
        ({"memory_limit": -1}, "memory_limit=-1: give a number of bytes"),
        ({"mesh": 8}, "mesh=8: give a jax.sharding.Mesh"),
    ],
)
def test_an_option_that_is_none_is_refused_before_anything_is_read(option, accepted):
    with pytest.raises(DataError, match=f"^{accepted}"):
        Tokenizer.load("a folder that is not there", **option)


def test_a_stream_gives_the_same(tokenizer, images):
    batches = [images[:2], images[1:]]
    for got, batch in zip(tokenizer.stream("encode_to_indices", iter(batches)), batches, strict=True):
        np.testing.assert_array_equal(got, tokenizer.encode_to_indices(batch))


def test_pure_functions(tokenizer, images):
    """Jitted by its user, and differentiated: the decoder's picture follows the latent."""
    encode, decode = tokenizer.function("encode"), tokenizer.function("decode")
    latent = jax.jit(encode)(tokenizer.variables, images)
    np.testing.assert_allclose(latent, tokenizer.encode(images), atol=1e-5)

    def error(latent):
        return jnp.mean((decode(tokenizer.variables, latent) - images) ** 2)

    before, slope = jax.jit(jax.value_and_grad(error))(latent)
    assert error(latent - 1e-2 * slope / jnp.linalg.norm(slope)) < before
    with pytest.raises(DataError, match="no function 'paint': there are encode, "):
        tokenizer.function("paint")


def test_saved_and_loaded(tokenizer, images, tmp_path):
    folder = tokenizer.save_pretrained(tmp_path / "a tokenizer ü", images)
    again = Tokenizer.from_pretrained(folder)
    np.testing.assert_array_equal(again.encode_to_indices(images), tokenizer.encode_to_indices(images))
    assert again.hash == tokenizer.hash
    assert again.provenance["step"] == 3
    assert again.provenance["figures"].keys() >= {"eval/psnr"}
    card = (folder / "README.md").read_text()
    for words in ("library_name: vqrae_jax", "16 codes of 32", "PSNR on the 3 images", "eval/psnr", again.hash):
        assert words in card
    assert "by a ViT encoder that started from random weights, and" in card  # of no pretrained family
    assert image_files.read_image(folder / "reconstructions.png").ndim == 3
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "twice" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_the_hash_is_of_the_codes_not_of_the_decoder(tokenizer):
    def changed(part):
        params = dict(tokenizer.trained["params"])
        if part == "codes":
            stats = jax.tree.map(lambda x: x + 1, tokenizer.trained["batch_stats"])
            return Tokenizer(tokenizer.module, {"params": params, "batch_stats": stats}, tokenizer.config).hash
        params[part] = jax.tree.map(lambda x: x + 1, params[part])
        return Tokenizer(tokenizer.module, {**tokenizer.trained, "params": params}, tokenizer.config).hash

    assert changed("decoder") == tokenizer.hash
    assert changed("encoder") != tokenizer.hash
    assert changed("codes") != tokenizer.hash
    with pytest.raises(DataError, match="has no hash: give config="):
        _ = Tokenizer(tokenizer.module, tokenizer.trained).hash


def test_a_damaged_or_missing_tokenizer_is_one_sentence(tokenizer, tmp_path):
    folder = tokenizer.save_pretrained(tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])  # as an interrupted download leaves it
    with pytest.raises(WeightsError, match=r"model\.safetensors .* is not a complete safetensors file"):
        Tokenizer.load(folder)
    with pytest.raises(WeightsError, match=r"'nobody/nothing' could not be had from the model hub .*no path"):
        Tokenizer.load("nobody/nothing")
    with pytest.raises(CheckpointError, match="is not a folder"):
        Tokenizer.load(tmp_path / "nowhere")


def test_push_to_hub(tokenizer, monkeypatch):
    """The hub's client is replaced: what would be uploaded can be loaded."""
    import huggingface_hub

    seen = {}

    class Hub:
        def __init__(self, token):
            seen["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            seen["hash"] = Tokenizer.load(folder_path).hash
            seen["card"] = (pathlib.Path(folder_path) / "README.md").read_text()

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert tokenizer.push_to_hub("me/tokens", token="t").endswith("me/tokens")
    assert seen["hash"] == tokenizer.hash
    assert seen["token"] == "t"
    assert 'Tokenizer.load("me/tokens")' in seen["card"]
    monkeypatch.setattr(Hub, "create_repo", lambda *_, **__: 1 / 0)
    with pytest.raises(WeightsError, match=r"push_to_hub\('me/tokens'\) did not work \(ZeroDivisionError"):
        tokenizer.push_to_hub("me/tokens")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((32, 32, 3), np.float32), r"shape \(32, 32, 3\).*images\[None\]"),
        (
            np.zeros((1, 3, 32, 32), np.float32),
            r"\(1, 3, 32, 32\).*channels come last: images\.transpose\(0, 2, 3, 1\)",
        ),
        (np.zeros((3, 32, 32), np.float32), r"\(3, 32, 32\); expected \[B, H, W, 3\] \(channels come last, three"),
        (np.zeros((1, 32, 32, 1), np.float32), r"three channels: images\.repeat\(3, axis=-1\)"),
        (np.zeros((1, 32, 32, 4), np.float32), r"three channels: images\[\.\.\., :3\]"),
        ("cat.png", r"images are a str; expected an array.*PIL\.Image\.open"),
        ([pathlib.Path("cat.png")], r"images are a P.*Path; expected an array"),
        (np.zeros((1, 32, 0, 3), np.float32), "shape"),
        (np.zeros((1, 32, 32, 3), np.int64), "images are int64; expected uint8, or floats"),
        (np.zeros((1, 32, 32, 3), bool), "images are bool"),
        (np.full((1, 32, 32, 3), 255.0), r"span \[255, 255\].*divide by 255"),
        (np.full((1, 32, 32, 3), -0.1), r"span \[-0\.1, -0\.1\]"),
        (np.full((1, 32, 32, 3), 1.0004), r"span \[1\.0004, 1\.0004\].*clip"),
        (
            np.stack([np.zeros((32, 32, 3)), np.full((32, 32, 3), np.nan)]),
            r"images\[1\] has values that are no numbers",
        ),
        (np.full((1, 32, 32, 3), np.inf), r"images\[0\] has values that are no numbers"),
    ],
)
def test_images_that_are_none(tokenizer, bad, message):
    with pytest.raises(DataError, match=message):
        tokenizer.encode_to_indices(bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((1, 4, 4), np.float32), "indices are float32; codes are integers"),
        (np.zeros((1, 5, 4), np.int32), r"shape \(1, 5, 4\); expected \[B, 4, 4\]"),
        (np.full((1, 4, 4), 32), r"span \[32, 32\]; the codes are 0 to 31"),
        (np.full((1, 4, 4), -1), r"span \[-1, -1\]"),
    ],
)
def test_codes_that_are_none(tokenizer, bad, message):
    with pytest.raises(DataError, match=message):
        tokenizer.decode_from_indices(bad)
