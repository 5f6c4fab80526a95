"""The pass of --mode=evaluate: figures against a plain computation, meshes, files, references."""

import json
import shutil

import jax
import numpy as np
import pytest
import scipy.linalg
from skimage.metrics import structural_similarity

from vqrae_jax.build import judges
from vqrae_jax.commands import reference_statistics
from vqrae_jax.config import PerceptualConfig
from vqrae_jax.data.images import write_image
from vqrae_jax.errors import WeightsError
from vqrae_jax.evaluation import report
from vqrae_jax.evaluation.probe import linear_probe
from vqrae_jax.evaluation.report import EVALUATION_FILE
from vqrae_jax.train import loop
from vqrae_jax.train.tokenizer import to_float


@pytest.fixture(scope="module")
def config(tiny, golden):
    """Compares by a DINOv2 of two blocks."""

    def make(batch=64, **settings):
        encoder = {"encoder_path": str(golden / "encoders" / "dinov2_swiglu"), "encoder_input_size": 28}
        evaluation = {"metrics": ("encoder", "linear_probe"), "examples": 2, **encoder, **settings}
        return tiny(evaluation=evaluation, data={"eval_batch_size": batch})

    return make


@pytest.fixture(scope="module")
def workdir(tiny, tmp_path_factory):
    """A run that has saved its start, with a discriminator."""
    workdir = tmp_path_factory.mktemp("run")
    run = loop.Run(tiny(adversary={"discriminator": "patch", "width": 4, "layers": 1}), workdir, jax.devices()[:1])
    run.save()
    run.close()
    return workdir


@pytest.fixture(scope="module")
def evaluated(config, workdir):
    return loop.evaluate(config(), workdir, jax.devices()[:1])


@pytest.fixture(scope="module")
def pictures(config, workdir):
    """All validation images, their reconstructions and codes, one call each."""
    run = loop.Run(config(), workdir, jax.devices()[:1], evaluate_step=0)
    (batch,) = run.evaluation
    images = {name: batch[name] for name in ("image", "mask")}
    seen = jax.device_get(jax.jit(run.task.evaluate_batch)(run.state.inference(), run.frozen, images))
    nets = judges.load_metric_networks(run.config.evaluation, ("encoder",))
    features = [np.asarray(nets.features(nets.params, judges.to_bytes(x))["encoder"], np.float64)
                for x in (to_float(batch["image"]), seen["reconstruction"])]  # fmt: skip
    run.close()
    return batch, seen, features


def test_figures_are_those_of_a_plain_computation(evaluated, pictures):
    batch, seen, (a, b) = pictures
    painted = np.clip(seen["reconstruction"], 0, 1).astype(np.float64)
    images = batch["image"] / 255
    assert evaluated["eval/images"] == 64
    assert evaluated["eval/psnr"] == pytest.approx(
        -10 * np.log10(((painted - images) ** 2).mean((1, 2, 3))).mean(), rel=1e-5
    )
    similar = [structural_similarity(x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
                                     data_range=1, channel_axis=-1, win_size=11)
               for x, y in zip(images, painted, strict=True)]  # fmt: skip
    assert evaluated["eval/ssim"] == pytest.approx(np.mean(similar), abs=1e-6)
    s, t = (np.cov(x, rowvar=False) for x in (a, b))
    apart = a.mean(0) - b.mean(0)
    distance = apart @ apart + np.trace(s) + np.trace(t) - 2 * np.trace(scipy.linalg.sqrtm(s @ t).real)
    assert evaluated["eval/encoder_rfd"] == pytest.approx(distance, rel=1e-4)
    probe = linear_probe(seen["code"], batch["label"])
    assert evaluated["eval/probe_accuracy"] == pytest.approx(probe["accuracy"])
    assert evaluated["eval/bits_per_image"] == 16 * 5


def test_meshes_and_batches_change_nothing(config, workdir, evaluated):
    assert loop.evaluate(config(batch=24), workdir) == pytest.approx(evaluated, rel=1e-3, abs=1e-5)


def test_figures_and_protocol_are_written(config, workdir, evaluated):
    written = json.loads((workdir / EVALUATION_FILE).read_text())
    assert {"step": written["step"], **written["figures"]} == pytest.approx(evaluated, rel=1e-3, abs=1e-5)
    protocol = written["protocol"]
    assert protocol["networks"]["encoder"]["features"] == 20
    assert len(protocol["networks"]["encoder"]["sha256"]) == 64
    assert protocol["jax"] == jax.__version__
    assert "32 pixels" in protocol["crop"]
    assert "ValidationPhotographs(crops=64" in protocol["data"]
    assert protocol["checkpoint"].endswith("checkpoints/0")
    page = (workdir / report.FOLDER / "index.html").read_text()
    for kind in ("best", "median", "worst"):
        for file in (f"{kind}0.png", f"{kind}1.png"):
            assert file in page
            assert (workdir / report.FOLDER / file).stat().st_size > 1000


def test_a_checkpoint_that_goes_meanwhile_is_not_missed(config, workdir, tmp_path, monkeypatch):
    """A run that trains beside the evaluation keeps its last few."""
    copy, measure = tmp_path / "run", loop.Run.measure
    shutil.copytree(workdir, copy)

    def measured(run):
        found = measure(run)
        shutil.rmtree(copy / "checkpoints" / "0")
        return found

    monkeypatch.setattr(loop.Run, "measure", measured)
    loop.evaluate(config(images=10, metrics=()), copy, jax.devices()[:1])
    protocol = json.loads((copy / EVALUATION_FILE).read_text())["protocol"]
    assert protocol["checkpoint"] == str(copy / "checkpoints" / "0")


def test_every_figure_has_a_meaning(evaluated):
    """The names that this run has; a longer end of a name goes before a shorter."""
    assert [name for name in evaluated if name != "step" and not report._meaning(name)] == []
    assert "Inception" in report._meaning("eval/rfid")
    assert "Inception" not in report._meaning("eval/encoder_rfd")
    assert report._meaning("eval/bits_per_image") != report._meaning("eval/entropy_bits_per_image")


def test_the_first_images_alone(config, workdir):
    figures = loop.evaluate(config(images=10, metrics=()), workdir, jax.devices()[:1])
    assert figures["eval/images"] == 10
    assert not [name for name in figures if "encoder" in name or "probe" in name]


def test_what_only_training_asks_is_not_read(config, workdir, evaluated):
    """Neither the networks of the losses nor the state of optimizer and discriminator."""
    loss = {"perceptual": PerceptualConfig(weight=1.0, trunk="none/such")}
    adversary = {"discriminator": "dino", "path": "none/such"}
    given = config()
    given = given.model_copy(update={"loss": given.loss.model_copy(update=loss),
                                     "adversary": given.adversary.model_copy(update=adversary)})  # fmt: skip
    run = loop.Run(given, workdir, jax.devices()[:1], evaluate_step=0)
    assert run.state.params == run.state.adversary == {}
    assert {"step": 0, **run.evaluate()} == pytest.approx(evaluated, rel=1e-6)
    run.close()


def test_references_from_a_folder_and_from_the_command(config, workdir, tmp_path, pictures, evaluated):
    """The validation images themselves as the reference: `fd` is then `rfd`."""
    folder, file = tmp_path / "images", tmp_path / "reference.npz"
    for number, image in enumerate(pictures[0]["image"]):
        write_image(folder / f"{number:02d}.png", image)
    settings = config().evaluation
    arguments = {"data": folder, "size": 32, "encoder": settings.encoder_path, "encoder-size": 28, "output": file}
    command = reference_statistics.parse([f"--{name}={value}" for name, value in arguments.items()])
    assert reference_statistics.reference_statistics(command).count == 64
    for source in (folder, file):
        figures = loop.evaluate(config(encoder_reference=str(source)), workdir, jax.devices()[:1])
        assert figures["eval/encoder_fd"] == pytest.approx(evaluated["eval/encoder_rfd"], rel=1e-4)
        told = json.loads((workdir / EVALUATION_FILE).read_text())["protocol"]["networks"]["encoder"]["reference"]
        assert told["source"] == str(source)
        assert told["images"] == 64
    np.savez(file, mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(WeightsError, match=r"encoder_reference=.* \(2048,\) .* have 20 channels"):
        loop.evaluate(config(encoder_reference=str(file)), workdir, jax.devices()[:1])


def test_training_measures_what_it_is_asked_to(config, tmp_path):
    run = loop.Run(config(training_metrics=("encoder",)), tmp_path, jax.devices()[:1])
    figures = run.evaluate()
    run.close()
    assert "eval/encoder_rfd" in figures
    assert "eval/probe_accuracy" not in figures
