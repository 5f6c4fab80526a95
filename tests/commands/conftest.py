"""A folder of images and its codes, shared by the tests of several commands."""

import numpy as np
import pytest

from vqrae_jax import Tokenizer
from vqrae_jax.commands import tokenize
from vqrae_jax.data import images


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """21 images in two classes, with spaces and umlauts in their names; image 5 is broken."""
    folder = tmp_path_factory.mktemp("a folder ü")
    rng = np.random.default_rng(0)
    for i in range(21):
        file = folder / ("cat ü" if i % 2 else "dog") / f"photo {i:02d}.png"
        images.write_image(file, rng.integers(0, 256, (34 + i, 40, 3), np.uint8))
    (folder / "cat ü" / "photo 11.png").write_bytes(b"")
    return folder


@pytest.fixture(scope="session")
def tokenized(trained, photos, tmp_path_factory):
    """The codes of `photos` in three shards."""
    folder = tmp_path_factory.mktemp("codes")
    arguments = [f"--checkpoint={trained}", f"--data={photos}", f"--output={folder}", "--batch=8", "--shard-size=8"]
    tokenize.tokenize(tokenize.parser.parse_args(arguments))
    return folder


@pytest.fixture(scope="session")
def tokenizers():
    """Options of `Tokenizer.load` -> the tokenizer of `trained` with its compiled programs."""
    return {}


@pytest.fixture(autouse=True)
def load_trained_once(request, monkeypatch, tokenizers):
    """Commands that load `trained` with the same options share its compiled programs."""
    if "trained" not in request.fixturenames:
        return
    trained, load = str(request.getfixturevalue("trained")), Tokenizer.load

    def load_once(path, *step, **options):
        if str(path) != trained:
            return load(path, *step, **options)
        key = (*step, *sorted(options.items()))
        if key not in tokenizers:
            tokenizers[key] = load(path, *step, **options)
        return tokenizers[key]

    monkeypatch.setattr(Tokenizer, "load", load_once)
