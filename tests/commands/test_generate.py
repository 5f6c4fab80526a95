import types
from unittest import mock

import numpy as np
import pytest

from vqrae_jax import Generator
from vqrae_jax.commands import generate
from vqrae_jax.data.codes import Codes
from vqrae_jax.data.images import read_image
from vqrae_jax.errors import CheckpointError, ConfigError, UserError
from vqrae_jax.evaluation import visualize
from vqrae_jax.inference import samples


def run(generator, output, *arguments):
    parsed = generate.parser.parse_args([f"--checkpoint={generator}", f"--output={output}", *arguments])
    return generate.generate(parsed)


@pytest.fixture(scope="module")
def written(trained_generator, tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    assert run(trained_generator, folder, "--count=5", "--npz=all.npz", "--strip=steps.png", "--steps=2", "--seed=1")
    return folder


def test_files_grid_and_npz_are_the_samples(written, trained_generator):
    generator = Generator.load(trained_generator)
    expected = generator.generate([0, 1, 0, 1, 0], seed=1, steps=2)
    with np.load(written / "all.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert labels.tolist() == [0, 1, 0, 1, 0]
    assert np.abs(images / 255 - expected).max() <= 0.5 / 255 + 1e-5
    np.testing.assert_array_equal(read_image(written / "00000003.png"), images[3])
    assert read_image(written / "grid.png").ndim == 3
    codes, tokenizer = generator.history(0, seed=1, steps=2)[:, 0], generator.tokenizer
    steps = visualize.sampling_steps(codes, 32, tokenizer.decode_from_indices, tokenizer.grid)
    np.testing.assert_array_equal(read_image(written / "steps.png"), steps)


def test_processes_share_the_samples_and_an_interrupted_run_is_continued(
    written, trained_generator, tmp_path, monkeypatch
):
    monkeypatch.setattr(samples, "SHARD", 2)
    options = "--count=5", "--steps=2", "--seed=1", "--npz=all.npz", "--format=none", "--processes=2"
    assert not run(trained_generator, tmp_path, *options, "--process=0")
    assert run(trained_generator, tmp_path, *options, "--process=1")
    assert run(trained_generator, tmp_path, *options, "--process=0")
    ours, theirs = (Codes(folder / "codes").load()[0] for folder in (tmp_path, written))
    np.testing.assert_array_equal(ours, theirs)
    assert (tmp_path / "all.npz").read_bytes() == (written / "all.npz").read_bytes()
    assert not (tmp_path / "00000003.png").exists()
    assert run(trained_generator, tmp_path, *options[:3], "--format=png", "--grid=")  # of codes that exist
    for i in range(5):
        np.testing.assert_array_equal(read_image(tmp_path / f"0000000{i}.png"), read_image(written / f"0000000{i}.png"))


def test_classes_are_names_or_numbers(trained_generator, tmp_path):
    run(trained_generator, tmp_path, "--classes=dog,0", "--count=3", "--set=temperature=0.5", "--set=schedule=linear")
    assert Codes(tmp_path / "codes").load()[1].tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("argument", "field"),
    [
        ("--classes=bird", "--classes"), ("--steps=0", "--steps"), ("--set=nothing", "--set"),
        ("--set=temperature=0", "temperature"), ("--npz=all.zip", "--npz"), ("--npz=/all.npz", "--npz"),
        ("--set==3", "--set"), ("--set=steps=none", "--steps"), ("--grid=a.gif", "--grid"), ("--strip=..", "--strip"),
        ("--tokenizer=nowhere", "--tokenizer"),
        ("--process=1", "--process"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_before_anything_is_written(trained_generator, tmp_path, argument, field):
    with pytest.raises(UserError) as error:
        run(trained_generator, tmp_path / "new", argument)
    assert error.value.field == field
    assert not (tmp_path / "new").exists()


def test_a_folder_of_other_files_is_refused(written, trained_generator, tmp_path):
    (tmp_path / "codes").mkdir()  # another process has started
    generate._check_output(tmp_path, "")
    generate._check_output(written, "")
    with pytest.raises(UserError) as error:
        run(trained_generator, trained_generator)
    assert error.value.field == "--output"


def test_a_tokenizer_is_refused_with_the_command_that_takes_it(trained, tmp_path):
    with pytest.raises(CheckpointError) as error:
        run(trained, tmp_path / "new")
    assert error.value.field == "--checkpoint"
    assert "vqrae reconstruct" in str(error.value)


def test_steps_of_an_autoregressive_generator_are_refused_by_the_option(tmp_path):
    causal = types.SimpleNamespace(module=mock.Mock(), require_tokenizer=mock.Mock(), choose_sampler=mock.Mock())
    causal.module.config.blocks.causal = True
    with mock.patch.object(generate.Generator, "load", return_value=causal), pytest.raises(ConfigError) as error:
        run("x", tmp_path, "--strip=steps.png")
    assert (error.value.field, error.value.value) == ("--strip", "steps.png")


def test_a_step_of_a_saved_folder_is_refused_by_the_option(trained_generator, tmp_path):
    Generator.load(trained_generator).save_pretrained(tmp_path / "saved")
    with pytest.raises(ConfigError) as error:
        run(tmp_path / "saved", tmp_path / "new", "--step=4")
    assert error.value.field == "--step"


def test_other_settings_in_the_same_folder_are_refused(written, trained_generator):
    with pytest.raises(UserError) as error:
        run(trained_generator, written, "--count=5", "--steps=3", "--seed=1")
    assert error.value.field == "--output"
