import numpy as np
import pytest

from vqrae_jax import sharding
from vqrae_jax.commands import latent_statistics
from vqrae_jax.commands.latent_statistics import estimate, parse
from vqrae_jax.data import images
from vqrae_jax.errors import ConfigError, DataError
from vqrae_jax.pretrained.sources import read_latent_statistics, read_principal_axes


@pytest.fixture(scope="module")
def latents():
    """37 "images" whose 3 channels, far from zero, are the latent itself."""
    rng = np.random.default_rng(0)
    return (1000 + rng.normal(size=(37, 4, 4, 3)) @ rng.normal(size=(3, 3))).astype(np.float32)


def batches(latents, size=16):
    """Batches of one size; where there is no image, the mask says so."""
    padded = np.pad(latents, ((0, -len(latents) % size), (0, 0), (0, 0), (0, 0)), constant_values=5.0)
    masks = np.arange(len(padded)) < len(latents)
    return ({"image": padded[i : i + size], "mask": masks[i : i + size]} for i in range(0, len(padded), size))


@pytest.mark.parametrize("per_position", [False, True])
def test_equals_float64_moments_although_the_mean_is_far_from_zero(latents, per_position):
    moments = estimate(lambda image: image, batches(latents), sharding.make_mesh())
    result = moments.result(per_position, 2)
    axes = 0 if per_position else (0, 1, 2)
    exact = latents.astype(np.float64)
    np.testing.assert_allclose(result["mean"], exact.mean(axes), rtol=1e-6)
    np.testing.assert_allclose(result["var"], exact.var(axes), rtol=2e-3)
    # The textbook sum of squares in float32 is off by much more.
    naive = (latents**2).mean((0, 1, 2)) - latents.mean((0, 1, 2)) ** 2
    assert np.abs(naive / exact.var((0, 1, 2)) - 1).max() > 2e-3


def test_principal_axes_diagonalize_the_covariance(latents):
    result = estimate(lambda image: image, batches(latents), sharding.make_mesh()).result(False, 3)
    rows = latents.reshape(-1, 3).astype(np.float64) - result["pca_mean"]
    covariance = np.cov((rows @ result["pca_basis"]).T, bias=True)
    np.testing.assert_allclose(covariance, np.diag(result["pca_var"]), atol=2e-3 * result["pca_var"][0])
    assert np.all(np.diff(result["pca_var"]) <= 0)


def test_the_command_writes_what_the_model_reads(golden, tmp_path):
    rng = np.random.default_rng(1)
    (tmp_path / "photos").mkdir()
    for i in range(5):
        images.write_image(tmp_path / "photos" / f"{i}.png", rng.integers(0, 256, (60, 70, 3)).astype(np.uint8))
    encoder, output = golden / "encoders" / "dinov2", tmp_path / "stats.npz"
    given = [f"--encoder={encoder}", f"--data={tmp_path / 'photos'}", f"--output={output}", "--size=56", "--batch=2"]
    latent_statistics.latent_statistics(parse([*given, "--per-position", "--components=4"]))
    stats = read_latent_statistics(str(output), "model.normalization_stat_path")
    assert stats["mean"].shape == stats["var"].shape == (4, 4, 36)
    assert read_principal_axes(str(output), "field")["pca_basis"].shape == (36, 4)


def test_any_source_of_images_serves(golden, tmp_path, capsys):
    given = [f"--encoder={golden / 'encoders' / 'dinov2'}", f"--output={tmp_path / 'stats.npz'}", "--size=56"]
    latent_statistics.latent_statistics(parse([*given, "--source=photographs", "--limit=5", "--batch=3"]))
    assert capsys.readouterr().out.startswith("5 images; ")
    with pytest.raises(ConfigError, match="--data is missing"):
        latent_statistics.latent_statistics(parse(given))
    with pytest.raises(ConfigError, match="--source=tape: give one of"):
        latent_statistics.latent_statistics(parse([*given, "--source=tape", "--data=x"]))


def test_the_output_must_be_npz(tmp_path):
    with pytest.raises(DataError, match="npz"):
        latent_statistics.latent_statistics(parse(["--encoder=x", "--data=y", f"--output={tmp_path / 'stats.pt'}"]))
