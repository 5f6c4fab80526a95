"""The networks of the metrics, and the files of their reference statistics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax.build import judges
from vqrae_jax.config import EvaluationConfig, PerceptualConfig
from vqrae_jax.errors import ConfigError, WeightsError
from vqrae_jax.evaluation import reference
from vqrae_jax.evaluation.moments import Gaussian
from vqrae_jax.models.inception import Inception
from vqrae_jax.models.perceptual import LPIPS

# The class token after the final norm, first channels: transformers 5.23 in PyTorch, on the golden's two images.
CLS = [[-0.46199018, 1.7107866, 0.29818735, 0.07764289], [-0.63822585, 0.8279656, 0.41295925, 0.49820557]]


def test_encoder_features_equal_pytorch(golden, assert_close):
    folder = golden / "encoders" / "dinov2_with_registers"
    io = np.load(folder / "io.npz")
    for pool, expected in (("mean", io["features_affine_56"].mean(1)), ("cls", np.array(CLS))):
        settings = EvaluationConfig(encoder_path=str(folder), encoder_input_size=56, encoder_pool=pool)
        nets = judges.load_metric_networks(settings, ("encoder",))
        features = jax.jit(nets.features)(nets.params, io["images_56"])["encoder"]
        assert_close(features[:, : expected.shape[1]], expected, 1e-5, pool)


def test_results_of_the_metric_networks():
    """Reconstructions are rounded to bytes."""
    modules = {"lpips": LPIPS(), "inception": Inception()}
    image = jax.ShapeDtypeStruct((3, 64, 48, 3), np.float32)
    params = {"lpips": jax.eval_shape(LPIPS().init, jax.random.key(0), image, image)["params"]}
    params["inception"] = jax.eval_shape(Inception().init, jax.random.key(0), image)["params"]
    results = jax.eval_shape(judges.MetricNetworks(modules, {}, {}).compare, params, image, image)
    assert {name: x.shape for name, x in results.items()} == {
        "lpips": (3,), "inception/image": (3, 2048), "inception/reconstruction": (3, 2048),
        "scores/reconstruction": (3, 1008),
    }  # fmt: skip
    image = jnp.array([-0.3, 0.1, 0.5, 2.0]).reshape(1, 4, 1, 1).repeat(3, -1)
    np.testing.assert_allclose(judges.to_bytes(image)[0, :, 0, 0] * 255, [0, 26, 128, 255])


@pytest.mark.parametrize(
    ("metric", "settings", "message"),
    [
        ("inception", {}, "evaluation.inception_path=None"),
        ("inception", {"inception_path": "/absent.pth"}, "evaluation.inception_path='/absent.pth'"),
        ("encoder", {"encoder_path": "/absent"}, "_path='/absent'"),
        ("lpips", {}, "loss.perceptual.trunk='none/such'"),
    ],
)
def test_missing_weights_name_the_field(metric, settings, message):
    perceptual = PerceptualConfig(trunk="none/such")
    with pytest.raises((ConfigError, WeightsError), match=message):
        judges.load_metric_networks(EvaluationConfig(**settings), ("linear_probe", metric), perceptual)


def test_an_encoder_that_does_not_fit_is_named_by_the_fields_of_evaluation(golden):
    for encoder, settings, field in (
        ("siglip", {"encoder_cls": "SigLIP2wNorm"}, "encoder_pool"),  # has no class token
        ("dinov2", {"encoder_input_size": 30}, "encoder_input_size"),
        ("siglip", {}, "encoder_cls"),
    ):
        settings = EvaluationConfig(encoder_path=str(golden / "encoders" / encoder), **settings)
        with pytest.raises(ConfigError) as error:
            judges.load_metric_networks(settings, ("encoder",))
        assert error.value.field == f"evaluation.{field}"


def test_reference_files_round_trip_and_others_are_refused(tmp_path):
    path, gaussian = tmp_path / "new" / "reference.npz", Gaussian(np.arange(3.0), np.eye(3), 7)
    network = {"network": "Dinov2withNorm", "pool": "cls", "path": "/here", "sha256": "0"}
    reference.write_reference(path, {"encoder": gaussian}, network)
    read = functools.partial(reference.read_reference, widths={"encoder": 3}, field="evaluation.encoder_reference")
    (again, images) = read(path, network={**network, "path": "/elsewhere"})
    for name, value in (("pool", "mean"), ("sha256", "1")):
        with pytest.raises(WeightsError, match=f'"{name}": "{value}"'):
            read(path, network={**network, name: value})
    assert again["encoder"].count == 7
    assert again["encoder"].digest() == gaussian.digest()
    assert images is None
    spatial, pair = Gaussian(np.ones(2), 2 * np.eye(2), 7), {"inception": 3, "spatial": 2}
    reference.write_reference(path, {"inception": gaussian, "spatial": spatial}, network)
    again, _ = read(path, widths=pair, network=network)
    assert [again[name].digest() for name in pair] == [gaussian.digest(), spatial.digest()]
    images = np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3)
    adm = {"mu": gaussian.mean, "sigma": gaussian.covariance, "arr_0": images}
    np.savez(path, **adm)
    assert read(path, network=network)[0]["encoder"].count is None
    np.testing.assert_array_equal(read(path, network=network, with_images=True)[1], adm["arr_0"])
    files = {
        "another network": {"mu": np.zeros(4), "sigma": np.eye(4)}, "other names": {"mean": np.zeros(3)},
        "not finite": {"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "texts": {"mu": np.full(3, "0")},
        "objects": {"mu": np.array([object()] * 3)}, "asymmetric": {"sigma": np.eye(3) + np.eye(3, k=1)},
        "several counts": {"count": np.ones(2)}, "floats": {"arr_0": np.zeros((2, 4, 4, 3))},
        "gray": {"arr_0": np.zeros((2, 4, 4), np.uint8)},
    }  # fmt: skip
    for name, arrays in files.items():
        np.savez(tmp_path / f"{name}.npz", **(arrays if name == "other names" else adm | arrays))
    np.savez(tmp_path / "no images.npz", mu=adm["mu"], sigma=adm["sigma"])
    content = bytearray(path.read_bytes())
    content[content.index(adm["arr_0"].tobytes()) + 9] ^= 1
    (tmp_path / "damaged.npz").write_bytes(content)
    (tmp_path / "no arrays.npz").write_bytes(b"PK")
    files |= dict.fromkeys(("no images", "damaged", "no arrays", "absent"))
    for name in files:
        with pytest.raises(WeightsError) as error:
            read(tmp_path / f"{name}.npz", network=network, with_images=True)
        assert error.value.field == "evaluation.encoder_reference", name
    with pytest.raises(WeightsError, match="mu_s"):
        read(path, widths=pair, network=network)
