"""The cache is set in processes of their own: it is a setting of the whole process."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from vqrae_jax import compilation

SCRIPT = """
import logging, sys, time
logging.basicConfig()
from vqrae_jax.compilation import enable_compilation_cache
folder = enable_compilation_cache()
print(folder)
import jax, jax.numpy as jnp
jax.jit(lambda x: sum(jnp.sin(x @ x + i) @ x for i in range(40)))(jnp.ones((8, 8)))
print(len(list(folder.iterdir())) if folder else None)
"""


@pytest.fixture
def run(tmp_path):
    def in_new_process(**settings):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
        environment |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path / "cache"), **settings}
        done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return (*done.stdout.split(), done.stderr)

    return in_new_process


def test_programs_are_kept_in_the_users_cache(run, tmp_path):
    folder, files, _ = run()
    assert folder.startswith(str(tmp_path / "cache" / "vqrae_jax"))
    assert int(files) > 0
    assert run()[1] == files  # read, not written again


def test_jax_settings_win(run, tmp_path):
    assert run(JAX_COMPILATION_CACHE_DIR=str(tmp_path))[0] == str(tmp_path)
    assert run(JAX_ENABLE_COMPILATION_CACHE="false")[0] == "None"


def test_a_folder_that_cannot_be_written_is_a_warning(run, tmp_path):
    (tmp_path / "file").write_text("")
    folder, files, told = run(XDG_CACHE_HOME=str(tmp_path / "file"))
    assert (folder, files) == ("None", "None")
    assert "no compilation cache" in told


def test_the_tests_own_cache_goes_away_with_them_and_another_stays(tmp_path):
    conftest = pathlib.Path(__file__).with_name("conftest.py")
    script = f"import os, runpy; runpy.run_path({str(conftest)!r}); print(os.environ['JAX_COMPILATION_CACHE_DIR'])"
    (tmp_path / "given").mkdir()

    def used(**settings):
        environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        environment |= {"TMPDIR": str(tmp_path), **settings}
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return pathlib.Path(done.stdout.strip())

    assert used().parent == tmp_path
    assert used(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "given")) == tmp_path / "given"
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


def test_options_of_a_gpu_are_known_to_the_compiler(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    chosen = compilation.options("gpu")
    assert chosen
    assert jax.jit(lambda x: x + 1, compiler_options=chosen)(1.0) == 2.0  # an unknown one is an error
    with pytest.raises(Exception, match="xla_gpu_no_such_option"):
        jax.jit(lambda x: x + 2, compiler_options={"xla_gpu_no_such_option": True})(1.0)


def test_flags_of_the_user_win(monkeypatch):
    (name,) = compilation.options("gpu")
    monkeypatch.setenv("XLA_FLAGS", f"--{name}=false")
    assert compilation.options("gpu") == {} == compilation.options("cpu")
