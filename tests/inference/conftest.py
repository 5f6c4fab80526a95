import jax
import pytest

from vqrae_jax.train import loop


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory):
    """The workdir of a run of a few steps."""
    workdir = tmp_path_factory.mktemp("trained")
    settings = {"steps": 3, "evaluate_every": 3}
    loop.train(tiny(train=settings), workdir, jax.devices()[:1])
    return workdir
