"""Images and file systems for the tests of data."""

import io

import fsspec
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def png():
    """Encodes a gray image of a level, 9 wide and 8 high."""

    def encode(level):
        stream = io.BytesIO()
        Image.new("RGB", (9, 8), (level,) * 3).save(stream, "PNG")
        return stream.getvalue()

    return encode


@pytest.fixture
def bucket():
    """The file system of memory:// addresses, empty before and after."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()
