import jax
import numpy as np
import pytest

from vqrae_jax.build.tokenizer import build_tokenizer
from vqrae_jax.commands import fit_codebook
from vqrae_jax.config import QuantizerParams
from vqrae_jax.data import images
from vqrae_jax.data.folder import list_images
from vqrae_jax.errors import ImageError, UserError
from vqrae_jax.inference import fitting
from vqrae_jax.inference.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def continuous(untrained, tmp_path_factory):
    """A continuous autoencoder with latent statistics, which the quantizer does not see."""
    folder = tmp_path_factory.mktemp("continuous")
    np.savez(folder / "stat.npz", mean=np.linspace(-1, 1, 36, dtype=np.float32))
    tokenizer = untrained(quantizer="none", noise_tau=0.8, normalization_stat_path=str(folder / "stat.npz"))
    return tokenizer.save_pretrained(folder / "saved")


def run(checkpoint, photos, output, *arguments):
    arguments = [f"--checkpoint={checkpoint}", f"--data={photos}", f"--output={output}", *arguments]
    return fit_codebook.fit_codebook(fit_codebook.parser.parse_args(arguments))


@pytest.fixture(scope="module")
def squares(photos):
    squares = []
    for file in list_images(str(photos)):
        try:
            squares.append(images.center_crop(images.read_image(file), 32))
        except ImageError:
            continue
    return np.stack(squares)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 2])
def test_a_continuous_autoencoder_gets_a_codebook(continuous, photos, squares, tmp_path, capsys, assert_same, depth):
    fitted = run(continuous, photos, tmp_path / "out", "--codes=16", f"--depth={depth}")
    loaded, before = Tokenizer.load(tmp_path / "out"), Tokenizer.load(continuous)
    assert loaded.hash == fitted.hash
    for part in ("encoder", "decoder"):
        assert_same(loaded.trained["params"][part], before.trained["params"][part])
    assert_same(loaded.trained["batch_stats"]["latent"], before.trained["batch_stats"]["latent"])
    assert loaded.config.noise_tau == 0
    assert (loaded.config.quantizer_params == QuantizerParams()) == (depth == 1)  # no setting without an effect
    # Codes of the images of the fit: all of the codebook, and much nearer than the mean of the latents.
    codes = loaded.encode_to_indices(squares).reshape(-1, depth)
    assert [len(np.unique(level)) for level in codes.T] == [16] * depth
    latents = before.encode(squares)
    error = np.mean((loaded.encode(squares) - latents) ** 2) / np.mean((latents - latents.mean((0, 1, 2))) ** 2)
    assert error < (0.8, 0.7)[depth - 1]
    printed = capsys.readouterr()
    assert "320 latents of 20 images" in printed.out
    assert f"quantization error {error:.4g}"[:-1] in printed.out
    assert "skipped 1" in printed.err


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [0, 7])
def test_a_learned_fusion_and_a_resampler_are_kept(untrained, squares, assert_same, tokens):
    params = {"layers": (0, -1), "fusion": "routed"}
    tokenizer = untrained(quantizer="none", encoder_params=params, resampler_tokens=tokens)
    trained = jax.device_get(tokenizer.trained)
    trained["params"]["quantizer"]["fusion"]["router"]["bias"] = np.float32([9, -9])
    tokenizer = Tokenizer(build_tokenizer(tokenizer.config).module, trained, tokenizer.config, frozen=True)
    latents = np.concatenate(list(fitting.encode_latents(tokenizer, [squares])))
    fitted, metrics = fitting.fit_codebook(tokenizer, latents, 16)
    assert_same(fitted.trained["params"]["quantizer"]["fusion"], trained["params"]["quantizer"]["fusion"])
    if tokens:
        queries = [x.trained["params"]["quantizer"]["quantizer"]["queries"] for x in (tokenizer, fitted)]
        assert_same(*queries)
    latents, quantized = (x.encode(squares).reshape(-1, x.module.quantizer.channels) for x in (tokenizer, fitted))
    error = np.mean((quantized - latents) ** 2) / np.mean((latents - latents.mean(0)) ** 2)
    np.testing.assert_allclose(error, metrics["quantization_error"], rtol=1e-3)
    assert error < 0.8


def test_a_codebook_is_replaced_and_too_many_codes_are_refused(trained, photos, tmp_path, monkeypatch):
    fitted = run(trained, photos, tmp_path / "out", "--codes=20", "--limit=5")
    assert (fitted.codebook_size, fitted.provenance["codebook"]) == (20, "k-means of 80 latents of 5 images")
    monkeypatch.setattr(fit_codebook, "read_latents", pytest.fail)  # errors come before it
    for arguments in (["--codes=337"], ["--codes=81", "--limit=5"], ["--source=tfds", "--split="], ["--data="]):
        with pytest.raises(UserError) as error:
            run(trained, photos, tmp_path / "absent", *arguments)
        assert error.value.field in ("--codes", "--split", "--data")
    with pytest.raises(SystemExit):
        run(trained, photos, tmp_path / "absent", "--seed=-1")
    assert not (tmp_path / "absent").exists()
