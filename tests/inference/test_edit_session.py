import numpy as np
import pytest

from vqrae_jax.data import images, photographs
from vqrae_jax.inference.edit_session import FIRST, MIX, NEAREST, SECOND, VIEW, Editor, Session
from vqrae_jax.inference.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def editor(trained):
    return Editor(Tokenizer.load(trained, batch_size=1))


@pytest.fixture(scope="module")
def loaded(editor):
    session = Session()
    for slot, photograph in zip((SECOND, FIRST), photographs.load_photographs("validation"), strict=True):
        session = editor.load(session, slot, photograph)
    return session


def test_a_loaded_image_is_shown_with_its_codes(editor, loaded):
    square = images.center_crop(photographs.load_photographs("validation")[1], 32)
    np.testing.assert_array_equal(loaded.slots[FIRST].codes, editor.tokenizer.encode_to_indices(square[None])[0])
    assert loaded.slots[MIX] is loaded.slots[FIRST]
    assert "PSNR" in loaded.message
    views = editor.render(loaded)
    assert set(views) == {f"{kind}{i}" for i in range(3) for kind in ("input", "reconstruction", "codes")} - {"input2"}
    assert all(view.shape == (VIEW, VIEW, 3) for view in views.values())
    np.testing.assert_array_equal(views["input0"][::10, ::10], square)
    assert editor.render(Session()) == {}


def test_a_selected_patch_is_marked_and_its_nearest_are_shown(editor, loaded):
    for slot in (SECOND, MIX):
        session = editor.select(loaded, slot, 0.3, 0.99)
        assert session.selected == (slot, 3, 1)
        assert f"**{loaded.slots[slot].codes[3, 1]}**" in session.message
        before, after = editor.render(loaded), editor.render(session)
        changed = {name for name in before if (before[name] != after[name]).any()}
        assert changed == {f"reconstruction{slot}", f"codes{slot}"}
        assert after["nearest"].shape[1] > NEAREST * 64
    assert editor.select(Session(), FIRST, 0.5, 0.5) == Session()


def test_a_region_is_pasted_into_the_mix_and_restored(editor, loaded):
    for slot in range(3):
        assert editor.paste(Session(), slot, 0.0, 0.0).slots == Session().slots
    assert editor.paste(loaded, MIX, 0.0, 0.0).slots == loaded.slots  # no region yet
    session = editor.paste(loaded, SECOND, 0.9, 0.9)
    session = editor.paste(session, SECOND, 0.6, 0.1)
    assert session.region == (0, 2, 4, 4)
    session = editor.paste(session, MIX, 0.0, 0.0)
    first, second, mix = session.slots
    assert (first, second) == loaded.slots[:MIX]
    np.testing.assert_array_equal(mix.codes[:, :2], second.codes[:, 2:])
    np.testing.assert_array_equal(mix.codes[:, 2:], first.codes[:, 2:])
    decoded = editor.tokenizer.decode_from_indices(mix.codes[None])[0]
    np.testing.assert_allclose(mix.reconstruction, decoded * 255, atol=0.51)
    assert editor.restore(session).slots == loaded.slots


def test_a_blend_leads_from_the_first_image_to_the_second(editor, loaded):
    middle = editor.blend(loaded, 0.5)
    assert middle.weight == 0.5
    for weight, slot in ((0.0, FIRST), (1.0, SECOND)):
        ends = editor.blend(middle, weight)
        np.testing.assert_array_equal(ends.slots[MIX].codes, loaded.slots[slot].codes)
        assert ends.blends is middle.blends
    assert editor.load(middle, FIRST, np.zeros((32, 32, 3), np.uint8)).blends == ()
    assert editor.blend(Session(), 0.5).slots == Session().slots


def test_a_file_that_is_not_an_image_changes_only_the_message(editor, loaded, tmp_path):
    for content in (b"not an image", b""):
        (tmp_path / "bad.png").write_bytes(content)
        session = editor.load_file(loaded, FIRST, str(tmp_path / "bad.png"))
        assert session.slots == loaded.slots
        assert "bad.png" in session.message
        assert str(tmp_path) not in session.message
    images.write_image(tmp_path / "good.png", np.zeros((40, 50, 3), np.uint8))
    assert not editor.load_file(loaded, FIRST, str(tmp_path / "good.png")).slots[FIRST].image.any()
