import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax import Generator, Tokenizer, sharding
from vqrae_jax.build import generator as builder
from vqrae_jax.errors import CheckpointError, ConfigError, StorageError, UserError, WeightsError
from vqrae_jax.generation.network import generate_codes
from vqrae_jax.inference import samples


@pytest.fixture(scope="module")
def generator(trained_generator):
    return Generator.load(trained_generator)


@pytest.mark.slow
def test_a_number_is_the_same_sample_in_any_batch_and_on_any_mesh(generator, trained_generator):
    labels = ["cat", 1, 0, "dog", 1]
    codes = generator.sample_codes(labels, seed=3)
    assert codes.shape == (5, 4, 4)
    np.testing.assert_array_equal(generator.sample_codes([1, 0], seed=3, first=1), codes[1:3])
    elsewhere = Generator.load(trained_generator, mesh=sharding.make_mesh(4, 2), batch_size=4)
    np.testing.assert_array_equal(elsewhere.sample_codes(labels, seed=3), codes)
    assert (generator.sample_codes(labels, seed=4) != codes).any()


def test_the_sampler_is_its_method(generator):
    ours, theirs = (generator.sample_codes(0, **{name: "chance"}) for name in ("sampler", "method"))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["masked", "autoregressive"])
def test_values_of_the_sampler_need_no_other_program_and_change_no_sample(generator, family):
    """The samples equal those of a program in which the values are constants."""
    config = generator.config.model_copy(update={"family": family})
    module, key = builder.build_generator(config), jax.random.key(0)
    noisy = jax.tree.map(lambda x: x + jax.random.normal(key, x.shape), builder.initial_variables(module, key))
    generator = Generator(module, noisy, config)
    hidden, labels = jnp.full((2, 16), 32), [0, 1]
    for settings in (
        {"guidance": 0.7, "temperature": 0.9}, {"guidance": 2.0, "last_temperature": 0.3},
        {"guidance": 0.1, "choice_temperature": 1.0, "guidance_schedule": "linear", "schedule": "linear"},
    ):  # fmt: skip
        sampler, variables = generator.choose_sampler(**settings), builder.module_variables(generator.variables)
        constant = jax.jit(
            lambda x, codes, sampler=sampler: generate_codes(module, x, key, codes, jnp.array(labels), sampler)
        )(variables, hidden)
        np.testing.assert_array_equal(generator.sample_codes(labels, **settings).reshape(2, 16), constant)
    (program,) = generator._compiled.values()
    assert program._cache_size() == 1


@pytest.mark.parametrize(("grids", "levels", "shape"), [
    (((1, 9),), 1, (9,)), (((1, 9),), 2, (9, 2)), (((1, 1), (2, 2)), 1, (5,)), (((1, 1),), 1, (1, 1)),
    (((3, 3),), 2, (3, 3, 2)),
])  # fmt: skip
def test_codes_have_the_shape_of_the_tokenizer_that_is_not_read(generator, grids, levels, shape):
    config = generator.config.model_copy(update={"grids": grids, "levels": levels})
    alone = Generator(builder.build_generator(config), {}, config)
    assert alone.code_shape == shape
    plan = samples.plan_samples(alone, np.zeros(2, np.int32), 0, alone.sampler)
    assert (plan.view_shape, plan.grids, plan.levels) == (shape, grids, levels)


def test_images_are_the_decoded_codes(generator, trained):
    images = generator.generate("cat", seed=1, count=2)
    expected = Tokenizer.load(trained).decode_from_indices(generator.sample_codes(["cat"] * 2, seed=1))
    np.testing.assert_allclose(images, expected, atol=1e-6)


def test_repainting_keeps_what_is_not_marked(generator):
    codes = np.random.default_rng(0).integers(0, 32, (3, 4, 4))
    mask = np.zeros((4, 4), bool)
    mask[2:] = True
    repainted = generator.inpaint(codes, mask, labels=[0, 1, None], seed=2)
    np.testing.assert_array_equal(repainted[:, :2], codes[:, :2])
    np.testing.assert_array_equal(generator.inpaint(codes, ~mask & mask), codes)
    each = np.stack([mask, ~mask, mask])
    np.testing.assert_array_equal(generator.inpaint(codes, each)[1, 2:], codes[1, 2:])


def test_likelihoods_prefer_the_class_of_the_codes(generator, code_folders):
    from vqrae_jax.data.codes import Codes

    codes, labels = Codes(code_folders["validation"]).load()
    right, wrong = (generator.log_likelihood(codes, x) for x in (labels, 1 - labels))
    assert right.shape == (12,)
    assert (right < 0).all()
    assert right.mean() > wrong.mean() - 1.0  # four steps of training decide little


@pytest.mark.slow
def test_a_history_ends_with_the_sample(generator):
    history = generator.history(["dog", "cat", None], seed=5, steps=4)
    assert history.shape == (4, 3, 4, 4)
    for before, after in itertools.pairwise(history):
        np.testing.assert_array_equal(np.where(before == 32, after, before), after)
    np.testing.assert_array_equal(history[-1], generator.sample_codes(["dog", "cat", None], seed=5, steps=4))
    np.testing.assert_array_equal(generator.history("cat", seed=5, steps=4, first=1)[:, 0], history[:, 1])


def test_no_images_have_no_codes(generator):
    none = np.zeros((0, 4, 4), int)
    assert generator.inpaint(none, np.zeros((4, 4), bool)).shape == (0, 4, 4)
    assert generator.log_likelihood(none).shape == (0,)


def test_a_name_that_is_a_number_is_a_name(generator):
    digits = Generator(generator.module, generator.variables, generator.config, classes=("1", "7"))
    assert digits.find_labels(["1", "7", 1, None]).tolist() == [0, 1, 1, 2]
    assert generator.find_labels(["1"]).tolist() == [1]


def test_a_saved_folder_is_the_same_generator(generator, tmp_path):
    generator.save_pretrained(tmp_path)
    loaded = Generator.load(tmp_path)
    np.testing.assert_array_equal(loaded.sample_codes([0, 1]), generator.sample_codes([0, 1]))
    assert (loaded.classes, loaded.config) == (generator.classes, generator.config)
    assert (tmp_path / "samples.png").is_file()
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(WeightsError):
        Generator.load(tmp_path)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda g: g.generate("bird"), "labels"),
        (lambda g: g.generate(2), "labels"),
        (lambda g: g.generate("9" * 5000), "labels"),
        (lambda g: g.generate(10**5000), "labels"),
        (lambda g: g.generate([0, 1], count=3), "labels"),
        (lambda g: g.generate(0, steps=0), "steps"),
        (lambda g: g.generate(0, guidance=-1.0), "guidance"),
        (lambda g: g.generate(0, top_k=3), "top_k"),
        (lambda g: g.generate(0, temprature=1.0), "temprature"),
        (lambda g: g.generate(0, seed=-1), "seed"),
        (lambda g: g.generate(0, first=-1), "first"),
        (lambda g: g.generate(0, count=-1), "count"),
        (lambda g: g.log_likelihood(np.zeros((1, 4, 4), int), seed=-1), "seed"),
        (lambda g: g.inpaint(np.zeros((1, 4, 4), int), np.zeros((4, 5), bool)), "mask"),
        (lambda g: g.inpaint(np.zeros((1, 4, 4), int), np.zeros((4, 4))), "mask"),
        (lambda g: g.inpaint(np.full((1, 4, 4), 32), np.zeros((4, 4), bool)), "codes"),
        (lambda g: g.log_likelihood(np.zeros((1, 16), int)), "codes"),
        (lambda g: g.push_to_hub("owner/name"), "generator.tokenizer"),
    ],
)
def test_bad_input_is_refused(generator, call, field):
    with pytest.raises(UserError) as error:
        call(generator)
    assert error.value.field == field
    assert field in str(error.value)


@pytest.mark.parametrize(
    ("path", "options", "field"),
    [
        (None, {}, "checkpoint"), (5, {}, "checkpoint"), ("missing folder", {"batch_size": "a"}, "batch_size"),
        ("missing folder", {"batch_size": 0}, "batch_size"), ("missing folder", {"mesh": 8}, "mesh"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unchecked_types")
def test_an_invalid_path_or_option_is_refused_before_anything_is_read(path, options, field):
    with pytest.raises(ConfigError) as error:
        Generator.load(path, **options)
    assert error.value.field == field


def test_a_step_chooses_a_checkpoint_of_a_run_only(generator, trained_generator, tmp_path):
    generator.save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as error:
        Generator.load(tmp_path, step=4)
    assert error.value.field == "step"
    with pytest.raises(CheckpointError) as error:
        Generator.load(trained_generator / "checkpoints" / "2", step=4)
    assert error.value.field == "checkpoint"


def test_a_folder_that_is_a_file_is_refused(generator, tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(StorageError) as error:
            generator.save_pretrained(folder)
        assert error.value.field == "folder"


def test_a_tokenizer_is_not_a_generator_and_another_tokenizer_does_not_fit(trained, trained_generator, untrained):
    with pytest.raises(UserError) as error:
        Generator.load(trained)
    assert error.value.field == "checkpoint"
    assert "vqrae reconstruct" in str(error.value)
    with pytest.raises(UserError) as error:
        Tokenizer.load(trained_generator)
    assert error.value.field == "checkpoint"
    assert "vqrae generate" in str(error.value)
    with pytest.raises(WeightsError) as error:
        Generator.load(trained_generator, tokenizer=untrained())
    assert error.value.field == "tokenizer"
    with pytest.raises(UserError) as error:
        Generator.load(trained_generator, tokenizer="nowhere")
    assert error.value.field == "tokenizer"


@pytest.mark.slow
def test_samples_of_a_mesh_equal_those_of_one_device_for_autoregression(tiny_generator, tmp_path, one_device):
    from vqrae_jax.train import loop

    loop.train(tiny_generator(generator={"family": "autoregressive"}), tmp_path, one_device)
    options = {"guidance": 1.0, "top_k": 5, "top_p": 0.9}
    one, eight = (
        Generator.load(tmp_path, mesh=mesh).sample_codes([0, 1] * 4, seed=1, **options)
        for mesh in (None, sharding.make_mesh(8, 1, jax.devices()))
    )
    np.testing.assert_array_equal(one, eight)
