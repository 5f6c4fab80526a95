"""Settings and shared fixtures: every test runs on the CPU, with eight simulated devices, without network."""

import atexit
import contextlib
import gc
import importlib.metadata
import os
import pathlib
import runpy
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import venv
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# XLA aborts the process if a device waits 40 s for the others in a collective, as happens on a busy machine.
os.environ["XLA_FLAGS"] += " --xla_cpu_collective_call_terminate_timeout_seconds=600"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later versions have no such flag
    # XLA's older emitters compile in less than half of the time (a training step in 2.4 s instead of 5.5).
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ["HF_HUB_OFFLINE"] = "1"
# Compiling dominates the tests; results are within the same tolerances with XLA's optimizations (set it to 0).
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# Programs are compiled once per session, for all tests and processes. The process that starts the workers creates the
# folder and deletes it; a folder that the environment names is kept.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="vqrae-jax-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jaxtyping
import numpy as np
import pytest

# Imports and tracing allocate many small objects, which garbage collection would visit again and again.
gc.set_threshold(50_000)
# Python compiles libraries again that are first imported by a module with checks, so these are imported before.
for name in ("beartype.door", "flax.linen", "optax", "orbax.checkpoint", "pydantic", "rich.table", "tensorboardX"):
    importlib.import_module(name)
jaxtyping.install_import_hook("vqrae_jax", "beartype.beartype")  # shapes and types of every annotation are checked

from vqrae_jax.runtime import keep_freed_memory  # noqa: E402

keep_freed_memory()

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
    return GOLDEN


@pytest.fixture(scope="session")
def assert_same():
    """Two trees with the same paths and equal arrays."""
    from jax.tree_util import keystr, tree_leaves_with_path

    def check(actual, expected):
        actual, expected = ({keystr(path): x for path, x in tree_leaves_with_path(t)} for t in (actual, expected))
        assert set(actual) == set(expected)
        for name in actual:
            np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)

    return check


@pytest.fixture(scope="session")
def assert_close():
    """Largest difference relative to the largest reference value."""

    def check(actual, expected, tolerance, name=""):
        actual, expected = np.asarray(actual), np.asarray(expected)
        assert actual.shape == expected.shape, name
        error = np.abs(actual - expected).max() / np.abs(expected).max()
        assert error <= tolerance, f"{name}: {error:.2e} > {tolerance:.0e}"

    return check


def tiny_config(**sections):
    """Returns a config that trains in seconds: 32 x 32 images, 4 x 4 codes, all parts trained."""
    from vqrae_jax import config

    values = {
        "model": {
            "encoder_config_path": None,
            "encoder_params": {"architecture": {
                "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8,
                "image_size": 32,
            }},
            "encoder_input_size": 32,
            "decoder_config_path": str(GOLDEN / "vqrae" / "decoder_config"),
            "decoder_patch_size": 8,
            "num_embeddings": 32,
        },
        "data": {"source": "photographs", "image_size": 32, "scale": (2, 8), "batch_size": 8,
                 "eval_batch_size": 64},
        "optimizer": {"warmup_steps": 2, "clip_norm": 1.0},
        "train": {"steps": 6, "log_every": 2, "evaluate_every": 6, "checkpoint_every": 3,
                  "trainable": ("encoder", "quantizer", "decoder")},
    }  # fmt: skip
    for section, fields in sections.items():
        values.setdefault(section, {}).update(fields)
    return config.from_dict(config.Config, values)


@pytest.fixture(scope="session")
def tiny():
    return tiny_config


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory):
    """The workdir of a run of three steps, with checkpoints of the last two."""
    import jax

    from vqrae_jax.train import loop

    workdir = tmp_path_factory.mktemp("trained")
    train = {"steps": 3, "evaluate_every": 3, "checkpoint_every": 1, "keep_last": 2, "keep_best": 0}
    loop.train(tiny(train=train), workdir, jax.devices()[:1])
    return workdir


@pytest.fixture(scope="session")
def code_folders(trained, tmp_path_factory):
    """Codes as if of `trained`, of two classes that differ: 48 images with two views to train, 12 to validate."""
    from vqrae_jax import Tokenizer
    from vqrae_jax.data import codes
    from vqrae_jax.data.code_shards import Columns

    rng, tokenizer = np.random.default_rng(0), Tokenizer.load(trained).hash
    folders = {}
    for name, images, views in (("train", 48, "flip"), ("validation", 12, "one")):
        shape, labels = ((2, 4, 4) if views == "flip" else (4, 4)), np.arange(images, dtype=np.int32) % 2
        low = labels.reshape(-1, *[1] * len(shape)) * 16
        grids = (low + rng.integers(0, 8, (images, *shape))).astype(np.uint16)
        folders[name] = tmp_path_factory.mktemp(name)
        plan = codes.Plan(tokenizer, "x", images, views, shape, "uint16", 32, 32, "npz", 16, classes=("cat", "dog"))
        for shard in codes.start_dataset(folders[name], plan):
            rows = slice(*plan.image_range(shard))
            columns = Columns(np.arange(images)[rows], ["x"] * len(labels[rows]), labels[rows], grids[rows])
            codes.write_shard(folders[name], plan, shard, columns)
        codes.finish_dataset(folders[name], plan)
    return folders


@pytest.fixture(scope="session")
def tiny_generator(trained, code_folders):
    """A function that returns a config of a generator that trains in seconds on the codes of `code_folders`."""
    from vqrae_jax import config

    def build(**sections):
        values = {
            "generator": {"tokenizer": str(trained), "width": 16, "depth": 1, "heads": 2, "mlp": 32, "dropout": 0.0,
                          "sampler": {"steps": 3}},
            "data": {"source": "codes", "path": str(code_folders["train"]), "batch_size": 8, "eval_batch_size": 8,
                     "eval_path": str(code_folders["validation"])},
            "optimizer": {"warmup_steps": 2, "clip_norm": 1.0},
            "train": {"task": "generator", "steps": 4, "log_every": 2, "evaluate_every": 4, "checkpoint_every": 2},
        }  # fmt: skip
        for section, fields in sections.items():
            values.setdefault(section, {}).update(fields)
        return config.from_dict(config.Config, values)

    return build


@pytest.fixture(scope="session")
def trained_generator(tiny_generator, tmp_path_factory):
    """The workdir of a run of a generator of four steps, with checkpoints of steps 2 and 4."""
    import jax

    from vqrae_jax.train import loop

    workdir = tmp_path_factory.mktemp("generator")
    loop.train(tiny_generator(), workdir, jax.devices()[:1])
    return workdir


@pytest.fixture(scope="session")
def untrained(golden):
    """A function that builds untrained tokenizers on a small frozen encoder: 32 x 32 images, 4 x 4 codes of 24."""
    import jax

    from vqrae_jax import Tokenizer
    from vqrae_jax.build.tokenizer import build_tokenizer, initial_variables
    from vqrae_jax.config import ModelConfig

    tokenizers = {}

    def build(**fields):
        key = repr(sorted(fields.items()))
        if key not in tokenizers:
            config = ModelConfig(
                encoder_config_path=str(golden / "encoders" / "dinov2"), encoder_input_size=56, decoder_patch_size=8,
                decoder_config_path=str(golden / "vqrae" / "decoder_config"), num_embeddings=24, **fields,
            )  # fmt: skip
            built = build_tokenizer(config)
            variables = initial_variables(built, jax.random.key(0), ["encoder", "quantizer", "decoder"])
            tokenizers[key] = Tokenizer(built.module, variables, config, frozen=True)
        return tokenizers[key]

    return build


@pytest.fixture(scope="session")
def run_elsewhere(tmp_path_factory):
    """A function that runs Python in another folder, as after `pip install -e .`, and returns what it prints.

    In an environment without the package, an interpreter is made that has what an editable installation adds.
    """
    python = sys.executable
    try:
        importlib.metadata.distribution("vqrae-jax")
    except importlib.metadata.PackageNotFoundError:
        folder = tmp_path_factory.mktemp("environment")
        venv.create(folder)
        (packages,) = folder.glob("lib/*/site-packages")
        (packages / "checkout.pth").write_text("\n".join([*site.getsitepackages(), str(GOLDEN.parents[1])]))
        python = str(folder / "bin" / "python")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments: object, folder: pathlib.Path) -> str:
        done = subprocess.run(
            [python, *map(str, arguments)], capture_output=True, text=True, cwd=folder, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def parsed_flags():
    """A context in which the flags of main.py are those of the arguments; it returns the remaining ones."""
    from absl import flags

    from vqrae_jax import main

    @contextlib.contextmanager
    def parse(arguments):
        argv = ["main", *arguments]
        try:
            with mock.patch.object(sys, "argv", argv):  # ml_collections reads overrides from it
                yield main._parse(argv)
        finally:
            flags.FLAGS.unparse_flags()
            for name in list(flags.FLAGS):
                if name.startswith("config."):
                    delattr(flags.FLAGS, name)
                elif flags.FLAGS[name].present:
                    flags.FLAGS[name].unparse()

    return parse


@pytest.fixture
def unchecked_types():
    """Turns the checks of annotations off, for arguments that the package itself refuses."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def deadline():
    """Fails a test that hangs, after a minute: imports on a busy machine take more than ten seconds."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    signal.setitimer(signal.ITIMER_REAL, 60)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def one_device():
    import jax

    return jax.devices()[:1]


@pytest.fixture(scope="session")
def one_mesh():
    import jax

    from vqrae_jax import sharding

    return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="session")
def buckets():
    """Local buckets for gs:// addresses, see bucket.py; the libraries read their address only once."""
    pytest.importorskip("gcsfs", reason="gcsfs is not installed (pip install 'vqrae-jax[gcs]')")
    store = runpy.run_path(str(pathlib.Path(__file__).with_name("bucket.py")))["serve"]()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in store.variables.items():
            patch.setenv(name, value)
        yield store
    store.shutdown()


@pytest.fixture(params=["local", "bucket"])
def workdir(request, tmp_path):
    """An empty folder, local and in a bucket."""
    from vqrae_jax import storage

    if request.param == "local":
        return tmp_path
    request.getfixturevalue("buckets")
    return storage.resolve_path(f"gs://bucket/{tmp_path.name}")


def pytest_addoption(parser):
    parser.addoption("--network", action="store_true", help="run the tests that need the model hub")


def pytest_collection_finish():
    """Leaves what exists out of all later garbage collections."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config, items):
    # Files that train whole runs come first: at the end, one of them would keep a single worker busy.
    items.sort(key=lambda item: item.path.parent.name not in ("train", "tests"))
    for item in items:
        if "network" in item.keywords and not config.getoption("--network"):
            item.add_marker(pytest.mark.skip(reason="needs the model hub: pass --network"))
        if "slow" in item.keywords and "slow" not in (config.getoption("-m") or ""):
            item.add_marker(pytest.mark.skip(reason="a long soak: pass -m slow"))
