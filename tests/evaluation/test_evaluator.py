"""The evaluation of a run: metrics against a plain computation, meshes, files, references."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from vqrae_jax.build import judges
from vqrae_jax.commands import reference_statistics
from vqrae_jax.config import PerceptualConfig
from vqrae_jax.data.images import write_image
from vqrae_jax.errors import WeightsError
from vqrae_jax.evaluation import report
from vqrae_jax.evaluation.distances import linear_probe, precision_recall
from vqrae_jax.evaluation.evaluator import Evaluator
from vqrae_jax.evaluation.metrics import border_contrast, ssim
from vqrae_jax.evaluation.report import EVALUATION_FILE
from vqrae_jax.train import loop
from vqrae_jax.train.run import open_run, save_checkpoint
from vqrae_jax.train.tokenizer import to_float


@pytest.fixture(scope="module")
def config(tiny, golden):
    """Returns a config whose metrics use a DINOv2 of two blocks."""

    def make(batch=64, **settings):
        encoder = {"encoder_path": str(golden / "encoders" / "dinov2_swiglu"), "encoder_input_size": 28}
        evaluation = {"metrics": ("encoder", "precision_recall", "linear_probe"), "examples": 2, **encoder, **settings}
        return tiny(evaluation=evaluation, data={"eval_batch_size": batch})

    return make


@pytest.fixture(scope="module")
def workdir(tiny, tmp_path_factory):
    """A run with a discriminator that has saved step 0."""
    workdir = tmp_path_factory.mktemp("run")
    adversary = {"discriminator": "patch", "width": 4, "layers": 1}
    with open_run(tiny(adversary=adversary), workdir, jax.devices()[:1]) as (run, state):
        save_checkpoint(run, state, {})
    return workdir


@pytest.fixture(scope="module")
def evaluated(config, workdir):
    return loop.evaluate(config(), workdir, jax.devices()[:1])


@pytest.fixture(scope="module")
def validation(config, workdir):
    """All validation images, what the model makes of them, and their features."""
    with open_run(config(), workdir, jax.devices()[:1], evaluate_step=0) as (run, state):
        (batch,) = run.evaluator._batches
        rows = jax.jit(run.task.evaluate)(state.inference(), run.frozen, {n: batch[n] for n in ("image", "mask")})
        networks = judges.load_metric_networks(run.config.evaluation, ("encoder",))
        extract = jax.jit(lambda params, x: networks.features(params, judges.to_bytes(x))["encoder"])
        features = [
            np.asarray(extract(networks.params, x), np.float64)
            for x in (to_float(jnp.asarray(batch["image"])), rows["reconstruction"])
        ]
        return batch, jax.device_get(rows), features


def test_metrics_equal_a_plain_computation(evaluated, validation):
    batch, rows, (a, b) = validation
    reconstructions = np.clip(rows["reconstruction"], 0, 1).astype(np.float64)
    images = batch["image"] / 255
    assert evaluated["eval/images"] == 64
    psnr = -10 * np.log10(((reconstructions - images) ** 2).mean((1, 2, 3))).mean()
    assert evaluated["eval/psnr"] == pytest.approx(psnr, rel=1e-5)
    similarity = float(ssim(rows["reconstruction"], to_float(batch["image"])).mean())
    assert evaluated["eval/ssim"] == pytest.approx(similarity, abs=1e-5)
    contrast = [np.asarray(border_contrast(x, 8), np.float64).sum(0) for x in (reconstructions, images)]
    assert evaluated["eval/seams"] == pytest.approx(np.divide(*contrast[0]) / np.divide(*contrast[1]), rel=1e-5)
    s, t = (np.cov(x, rowvar=False) for x in (a, b))
    distance = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * scipy.linalg.sqrtm(s @ t).real)
    assert evaluated["eval/encoder_rfd"] == pytest.approx(distance, rel=1e-4)
    assert (evaluated["eval/encoder_rprecision"], evaluated["eval/encoder_rrecall"]) == precision_recall(a, b)
    probe = linear_probe(rows["code"], batch["label"])
    assert evaluated["eval/probe_accuracy"] == pytest.approx(probe["accuracy"])
    assert evaluated["eval/bits_per_image"] == 16 * 5


@pytest.mark.slow
def test_metrics_do_not_depend_on_mesh_and_batch_and_are_written_with_the_protocol(config, workdir, evaluated):
    assert loop.evaluate(config(batch=24), workdir) == pytest.approx(evaluated, rel=1e-3, abs=1e-5)
    written = json.loads((workdir / EVALUATION_FILE).read_text())
    assert {"step": written["step"], **written["metrics"]} == pytest.approx(evaluated, rel=1e-3, abs=1e-5)
    protocol = written["protocol"]
    encoder = protocol["networks"]["encoder"]
    assert (encoder["features"], len(encoder["sha256"])) == (20, 64)
    assert protocol["jax"] == jax.__version__
    assert "32 pixels" in protocol["crop"]
    assert "ValidationPhotographs(crops=64" in protocol["data"]
    assert protocol["checkpoint"].endswith("checkpoints/0")
    page = (workdir / report.FOLDER / "index.html").read_text()
    for file in (f"{group}{number}.png" for group in ("best", "median", "worst") for number in (0, 1)):
        assert file in page
        assert (workdir / report.FOLDER / file).stat().st_size > 1000
    # Every metric has a description, that of the longest matching end of its name.
    assert [name for name in evaluated if name != "step" and not report.describe_metric(name)] == []
    assert "Inception" in report.describe_metric("eval/rfid")
    assert "Inception" not in report.describe_metric("eval/encoder_rfd")
    assert report.describe_metric("eval/bits_per_image") != report.describe_metric("eval/entropy_bits_per_image")


@pytest.mark.slow
def test_the_checkpoint_may_be_deleted_while_ten_images_are_evaluated(config, workdir, tmp_path, monkeypatch):
    """A run that trains at the same time keeps only its last checkpoints."""
    copy, evaluate = tmp_path / "run", Evaluator.evaluate
    shutil.copytree(workdir, copy)

    def evaluate_and_delete(*args):
        result = evaluate(*args)
        shutil.rmtree(copy / "checkpoints" / "0")
        return result

    monkeypatch.setattr(Evaluator, "evaluate", evaluate_and_delete)
    metrics = loop.evaluate(config(images=10, metrics=()), copy, jax.devices()[:1])
    assert metrics["eval/images"] == 10
    assert not [name for name in metrics if "encoder" in name or "probe" in name]
    protocol = json.loads((copy / EVALUATION_FILE).read_text())["protocol"]
    assert protocol["checkpoint"] == str(copy / "checkpoints" / "0")


@pytest.mark.slow
def test_what_only_training_needs_is_not_read(config, workdir, evaluated):
    """Neither the networks of the loss nor the state of optimizer and discriminator."""
    settings = config()
    loss = settings.loss.model_copy(update={"perceptual": PerceptualConfig(weight=1.0, trunk="none/such")})
    adversary = settings.adversary.model_copy(update={"discriminator": "dino", "path": "none/such"})
    settings = settings.model_copy(update={"loss": loss, "adversary": adversary})
    with open_run(settings, workdir, jax.devices()[:1], evaluate_step=0) as (run, state):
        assert state.params == state.adversary == {}
        metrics = run.evaluator.evaluate(state.inference(), run.frozen).metrics
    assert {"step": 0, **metrics} == pytest.approx(evaluated, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["statistics", "folder"])
def test_references_are_folders_and_statistics_of_the_command(config, workdir, tmp_path, validation, evaluated, kind):
    """With the validation images as the reference, `fd` equals `rfd`."""
    source = tmp_path / "images"
    for number, image in enumerate(validation[0]["image"]):
        write_image(source / f"{number:02d}.png", image)
    if kind == "statistics":
        encoder, file = config().evaluation.encoder_path, tmp_path / "reference.npz"
        arguments = {"data": source, "size": 32, "encoder": encoder, "encoder-size": 28, "output": file}
        command = reference_statistics.parser.parse_args([f"--{name}={value}" for name, value in arguments.items()])
        assert reference_statistics.reference_statistics(command).count == 64
        source = file
    chosen = {"metrics": ("encoder",) if kind == "statistics" else ("encoder", "precision_recall")}
    metrics = loop.evaluate(config(encoder_reference=str(source), **chosen), workdir, jax.devices()[:1])
    assert metrics["eval/encoder_fd"] == pytest.approx(evaluated["eval/encoder_rfd"], rel=1e-4)
    if kind == "folder":
        assert metrics["eval/encoder_recall"] == metrics["eval/encoder_rrecall"]
    protocol = json.loads((workdir / EVALUATION_FILE).read_text())["protocol"]
    reference = protocol["networks"]["encoder"]["reference"]
    assert (reference["source"], reference["images"]) == (str(source), 64)


def test_a_reference_of_another_network_is_an_error(config, workdir, tmp_path):
    file = tmp_path / "reference.npz"
    np.savez(file, mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(WeightsError, match=r"2048.* 20 ") as error:
        loop.evaluate(config(encoder_reference=str(file), metrics=("encoder",)), workdir, jax.devices()[:1])
    assert error.value.field == "evaluation.encoder_reference"


@pytest.mark.slow
def test_training_has_metrics_of_its_own(config, tmp_path):
    with open_run(config(training_metrics=("encoder",)), tmp_path, jax.devices()[:1]) as (run, state):
        metrics = run.evaluator.evaluate(state.inference(), run.frozen).metrics
    assert "eval/encoder_rfd" in metrics
    assert "eval/probe_accuracy" not in metrics
