"""Every test runs on the CPU, with eight pretended devices, without network."""

import os
import pathlib
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"
# One program is compiled once per session, however many tests and processes run it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="vqrae-jax-tests-"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import numpy as np
import pytest

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
    return GOLDEN


@pytest.fixture(scope="session")
def assert_close():
    """Largest difference relative to the largest reference value."""

    def check(actual, expected, tolerance, name=""):
        actual, expected = np.asarray(actual), np.asarray(expected)
        assert actual.shape == expected.shape, name
        error = np.abs(actual - expected).max() / np.abs(expected).max()
        assert error <= tolerance, f"{name}: {error:.2e} > {tolerance:.0e}"

    return check


@pytest.fixture(scope="session", autouse=True)
def _forget_compiled_programs():
    yield
    shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


def pytest_addoption(parser):
    parser.addoption("--network", action="store_true", help="run the tests that need the model hub")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "network" in item.keywords and not config.getoption("--network"):
            item.add_marker(pytest.mark.skip(reason="needs the model hub: pass --network"))
        if "slow" in item.keywords and "slow" not in (config.getoption("-m") or ""):
            item.add_marker(pytest.mark.skip(reason="a long soak: pass -m slow"))
