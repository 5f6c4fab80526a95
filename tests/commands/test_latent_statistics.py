import jax
import numpy as np
import pytest

from vqrae_jax import sharding
from vqrae_jax.build.tokenizer import build_tokenizer
from vqrae_jax.commands.latent_statistics import estimate, latent_statistics, parser, summarize
from vqrae_jax.config import DataConfig, ModelConfig, from_dict
from vqrae_jax.data import pipeline
from vqrae_jax.errors import ConfigError, UserError, WeightsError
from vqrae_jax.pretrained.sources import read_latent_statistics, read_principal_axes


def run(*arguments):
    return latent_statistics(parser.parse_args(arguments))


@pytest.fixture(scope="module")
def latents():
    """37 "images" whose 3 channels, far from zero, are the latents themselves."""
    rng = np.random.default_rng(0)
    return (1000 + rng.normal(size=(37, 4, 4, 3)) @ rng.normal(size=(3, 3))).astype(np.float32)


@pytest.fixture(scope="module")
def moments(latents):
    size = 16
    padded = np.pad(latents, ((0, -len(latents) % size), (0, 0), (0, 0), (0, 0)), constant_values=5.0)
    masks = np.arange(len(padded)) < len(latents)
    batches = ({"image": padded[i : i + size], "mask": masks[i : i + size]} for i in range(0, len(padded), size))
    return estimate(lambda image: image, batches, sharding.make_mesh())


@pytest.mark.parametrize("per_position", [False, True])
def test_moments_equal_float64_although_the_mean_is_far_from_zero(latents, moments, per_position):
    channels, positions = moments
    result = summarize(channels, positions if per_position else None, 2)
    axes = 0 if per_position else (0, 1, 2)
    exact = latents.astype(np.float64)
    np.testing.assert_allclose(result["mean"], exact.mean(axes), rtol=1e-6)
    np.testing.assert_allclose(result["var"], exact.var(axes), rtol=2e-3)
    # The textbook sum of squares in float32 has a much larger error.
    naive = (latents**2).mean((0, 1, 2)) - latents.mean((0, 1, 2)) ** 2
    assert np.abs(naive / exact.var((0, 1, 2)) - 1).max() > 2e-3


def test_principal_axes_diagonalize_the_covariance(latents, moments):
    result = summarize(moments[0], None, 3)
    rows = latents.reshape(-1, 3).astype(np.float64) - result["pca_mean"]
    covariance = np.cov((rows @ result["pca_basis"]).T, bias=True)
    np.testing.assert_allclose(covariance, np.diag(result["pca_var"]), atol=2e-3 * result["pca_var"][0])
    assert np.all(np.diff(result["pca_var"]) <= 0)


def test_the_command_writes_what_the_model_reads(golden, tmp_path, capsys):
    output = tmp_path / "stats.npz"
    arguments = [f"--encoder={golden / 'encoders' / 'dinov2'}", f"--output={output}", "--size=56"]
    run(*arguments, "--source=photographs", "--limit=5", "--batch=2", "--per-position", "--components=4")
    assert capsys.readouterr().out.startswith("5 images; ")
    statistics = read_latent_statistics(str(output), "model.normalization_stat_path", (4, 4, 36))
    assert statistics["mean"].shape == statistics["var"].shape == (4, 4, 36)
    assert read_principal_axes(str(output), "field")["pca_basis"].shape == (36, 4)
    wrong = {"--data": [], "--source": ["--source=tape", "--data=x"], "--output": ["--data=x", "--output=stats.pt"]}
    for field, others in wrong.items():
        with pytest.raises(UserError) as error:
            run(*arguments, *others)
        assert error.value.field == field


@pytest.mark.parametrize(("layers", "fusion"), [
    ("0,1,-1", "mean"),
    *(pytest.param("0,1,-1", fusion, marks=pytest.mark.slow) for fusion in ("concat", "sum")),
    pytest.param("-1", "mean", marks=pytest.mark.slow),
])  # fmt: skip
def test_normalized_latents_have_mean_zero_and_deviation_one(golden, tmp_path, caplog, layers, fusion):
    output = tmp_path / "stats.npz"
    encoder = {"encoder_config_path": str(golden / "encoders" / "dinov2"), "encoder_input_size": 56}
    run(
        f"--encoder={encoder['encoder_config_path']}", f"--output={output}", "--size=56", f"--layers={layers}",
        f"--fusion={fusion}", "--source=photographs", "--limit=8", "--batch=8", "--components=4",
    )  # fmt: skip
    params = {"layers": [int(layer) for layer in layers.split(",")], "fusion": fusion}

    def build(**changes):
        decoder = {"decoder_config_path": "ViT-S", "normalization_stat_path": str(output)}
        fields = encoder | decoder | {"encoder_params": params} | changes
        return build_tokenizer(from_dict(ModelConfig, fields))

    built = build()
    (batch,) = pipeline.evaluation_batches(DataConfig(source="photographs", image_size=56, eval_batch_size=8), limit=8)
    latents = jax.jit(built.module.encoder.apply)({"params": built.pretrained["encoder"]}, batch["image"] / 255)
    latents = built.module.bind({"batch_stats": {"latent": built.latent_stats}}).normalize(latents)
    np.testing.assert_allclose(np.mean(latents, (0, 1, 2)), 0, atol=1e-3)
    np.testing.assert_allclose(np.std(latents, (0, 1, 2)), 1, rtol=1e-2)
    others = [
        {**params, "layers": [1]},
        {**params, "normalize": False},
        {**params, "fusion": "sum" if fusion == "mean" else "mean"},
    ]
    for change in [*({"encoder_params": other} for other in others), {"encoder_input_size": 112}]:
        with pytest.raises(ConfigError) as error:
            build(**change)
        assert error.value.field == "model.normalization_stat_path"
    arrays = dict(np.load(output))
    for text, kind in (('{"layers": ', WeightsError), (str(arrays["latent"])[:-2] + '0"}', ConfigError)):
        np.savez(output, **arrays | {"latent": text})
        with pytest.raises(kind):  # a damaged description, and other weights
            build()
    np.savez(output, mean=arrays["mean"], var=arrays["var"])
    build()
    assert len(caplog.records) == (layers != "-1")
