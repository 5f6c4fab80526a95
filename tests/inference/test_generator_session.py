import jax
import numpy as np
import pytest

from vqrae_jax import Generator
from vqrae_jax.build import generator as builder
from vqrae_jax.config import GeneratorConfig
from vqrae_jax.data import images, photographs
from vqrae_jax.errors import DataError
from vqrae_jax.inference.edit_session import VIEW
from vqrae_jax.inference.generator_session import ALL, ANY, LIMIT, GeneratorActions, Repaint, Samples


@pytest.fixture(scope="module")
def actions(trained_generator):
    return GeneratorActions(Generator.load(trained_generator))


@pytest.fixture(scope="module")
def samples(actions):
    return actions.sample(Samples(), 3, ALL, 5)


def test_samples_are_those_of_the_generator_and_a_selected_one_has_its_steps(actions, samples):
    codes = actions.generator.sample_codes([0, 1, 0], seed=5)
    np.testing.assert_array_equal(samples.history[-1], codes)
    assert samples.captions == ("cat", "dog", "cat")
    decoded = actions.tokenizer.decode_from_indices(codes)
    np.testing.assert_allclose(samples.images, decoded * 255, atol=0.51)
    chosen = actions.choose(samples, 1)
    assert (actions.show_steps(chosen) != actions.show_steps(samples)).any()
    np.testing.assert_array_equal(actions.load_sample(Repaint(), chosen).codes, codes[1])
    assert actions.show_steps(Samples()) is None
    assert actions.choose(Samples(), 1).images is None
    assert actions.load_sample(Repaint(), Samples()).codes is None


def test_repainting_keeps_what_is_outside_of_the_region(actions):
    loaded = actions.load(photographs.load_photographs("validation")[0])
    np.testing.assert_allclose(
        loaded.before, actions.tokenizer.decode_from_indices(loaded.codes[None])[0] * 255, atol=0.51
    )
    assert set(actions.render(loaded)) == {"before"}
    selected = actions.select(actions.select(loaded, 0.9, 0.3), 0.3, 0.6)
    assert selected.region == (1, 1, 3, 4)
    repainted = actions.repaint(selected, "dog", 3)
    mask = np.zeros((4, 4), bool)
    mask[1:3, 1:4] = True
    expected = actions.generator.inpaint(loaded.codes[None], mask, "dog", seed=3)
    np.testing.assert_array_equal(expected[0][~mask], loaded.codes[~mask])
    np.testing.assert_allclose(repainted.after, actions.tokenizer.decode_from_indices(expected)[0] * 255, atol=0.51)
    np.testing.assert_array_equal(repainted.codes, loaded.codes)  # the next seed starts from the same image
    views = actions.render(repainted)
    assert {name: view.shape for name, view in views.items()} == dict.fromkeys(views, (VIEW, VIEW, 3))
    covered = (views["hidden"].reshape(4, 80, 4, 80, 3) == views["hidden"][100, 100]).all((1, 3, 4))
    np.testing.assert_array_equal(covered, mask)
    again = actions.select(repainted, 0.0, 0.0)
    assert (again.corner, again.region, again.after) == ((0, 0), None, None)


def test_errors_are_a_sentence_and_change_nothing_else(actions, samples, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"not an image")
    for field, new in {
        "Class='bird'": actions.sample(samples, 1, "bird", 0),
        "Class=2": actions.sample(samples, 1, 2, 0),
        "Steps=0": actions.sample(samples, 1, ANY, 0, steps=0),
        "Sampler='none'": actions.sample(samples, 1, ANY, 0, sampler="none"),
        "Seed=-1": actions.sample(samples, 1, ANY, -1),
        "Guidance=-1.0": actions.sample(samples, 1, ANY, 0, guidance=-1.0),
        f"Images={LIMIT + 1}": actions.sample(samples, LIMIT + 1, ANY, 0),
    }.items():
        assert new.message.startswith(f"**{field}")
        assert new.history is samples.history
    loaded = actions.load_codes(samples.history[-1, 0])
    assert actions.repaint(loaded, ANY, 0).after is None  # no region yet
    selected = actions.select(actions.select(loaded, 0.0, 0.0), 0.0, 0.0)
    for action in (
        lambda: actions.repaint(selected, ANY, 0, steps=0),
        lambda: actions.load_file(selected, str(tmp_path / "bad.png")),
    ):
        new = action()
        assert new.message.startswith("**")
        assert str(tmp_path) not in new.message
        assert (new.region, new.codes) == (selected.region, loaded.codes) or new.codes is selected.codes
    other = Repaint(loaded.codes, loaded.before, region=(0, 0, 5, 1))  # of another grid
    assert "(0, 0, 5, 1)" in actions.repaint(other, ANY, 0).message
    assert actions.select(Repaint(), 0.5, 0.5).corner is None
    images.write_image(tmp_path / "good.png", np.zeros((40, 50, 3), np.uint8))
    assert actions.load_file(selected, str(tmp_path / "good.png")).region is None


def test_a_generator_without_a_tokenizer_is_refused(actions):
    generator = actions.generator
    alone = Generator(generator.module, generator.variables, generator.config)
    with pytest.raises(DataError) as error:
        GeneratorActions(alone)
    assert error.value.field == "tokenizer"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "quantizer", "rows"),
    [("autoregressive", "ema", False), ("masked", "residual", False), ("masked", "residual", True)],
)
def test_sessions_without_steps_without_classes_and_with_several_levels(untrained, family, quantizer, rows):
    tokenizer = untrained(quantizer=quantizer, quantize_before_reshape=rows)
    shape = tokenizer.code_shape
    levels = shape[-1] if quantizer == "residual" else 1
    config = GeneratorConfig(
        family=family, grids=((4, 4),), levels=levels, num_embeddings=tokenizer.codebook_size, classes=0,
        width=16, depth=1, heads=2, mlp=32,
    )  # fmt: skip
    module = builder.build_generator(config)
    variables = jax.jit(builder.initial_variables, static_argnums=0)(module, jax.random.key(0))
    actions = GeneratorActions(Generator(module, variables, config, tokenizer))
    samples = actions.sample(Samples(), 2, ANY, 0, steps=3)
    assert samples.history.shape == (3 if family == "masked" else 1, 2, *shape)
    assert samples.captions == ()
    assert (actions.show_steps(samples) is None) == (family == "autoregressive")
    image = actions.load_sample(Repaint(), samples)
    selected = actions.select(actions.select(image, 0.9, 0.9), 0.3, 0.9)
    assert "codes changed" in actions.repaint(selected, ANY, 1).message
