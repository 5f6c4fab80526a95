import json
import os
import pathlib
import subprocess
import sys

import pytest

from vqrae_jax.inference.tokenizer import Tokenizer
from vqrae_jax.train.loop import METRICS_FILE, PICTURE_FILE

ROOT = pathlib.Path(__file__).parents[1]


def run(*arguments, **options):
    """The command as a user types it, on one device."""
    env = {**os.environ, "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    command = [sys.executable, "-m", "vqrae_jax.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/quickstart.py"], "--workdir is required"),
        (["--config=configs/absent.py", "--workdir=/tmp/x"], "configs/absent.py"),
        (["--config=configs/quickstart.py", "--wordkir=/tmp/x"], "Unknown command line flag 'wordkir'"),
        (["--config=configs/quickstart.py", "--config.train.steps=many"], "--config.train.steps=many: invalid literal"),
        (["--config=configs/dinov2_b.py", "--workdir=/tmp/x"], "data.path is not set"),
        (["--config=configs/quickstart.py", "--workdir=/tmp/x", "--config.mesh.model=3"], "does not divide"),
        (["--config=configs/quickstart.py", "--config.model.num_embedings=4"], "did you mean model.num_embeddings"),
        (
            ["--config=configs/quickstart.py", "--workdir=/tmp/x", "--config.data.batch_size=0"],
            "data.batch_size=0: Input should be greater than or equal to 1",
        ),
        (["--config=configs/quickstart.py", "--workdir=/tmp/x", "--profile_steps=3"], "'3' is no range, as in 10:13"),
    ],
)
def test_what_no_attempt_would_mend_is_one_message_and_exit_code_2(arguments, message):
    assert_one_message(run(*arguments, timeout=60), 2, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/quickstart.py", "--workdir=s3://bucket/run"], "in folders and in gs:// buckets only"),
        (["--config=configs/dinov2_b.py", "--workdir=/tmp/x", "--config.data.path=/tmp/absent"], "does not exist"),
        (["--config=configs/quickstart.py", "--workdir=/tmp/x", "--processes=2"], "Give all three"),
    ],
)
def test_other_input_errors_are_one_message_and_exit_code_1(arguments, message):
    assert_one_message(run(*arguments, timeout=60), 1, message)


def assert_one_message(done, code, message):
    assert done.returncode == code
    assert message in done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr


def test_the_quickstart_shortened(tmp_path):
    """The README's first command, with fewer steps; then the same again, which resumes."""
    short = [f"--config.train.{name}=2" for name in ("steps", "evaluate_every", "checkpoint_every", "log_every")]
    command = ["--config=configs/quickstart.py", f"--workdir={tmp_path}", *short]
    first = run(*command)
    assert first.returncode == 0, first.stderr
    for row in ("validation PSNR", "codebook use", "perplexity", PICTURE_FILE, METRICS_FILE):
        assert row in first.stdout.replace("\n", "")
    again = run(*command, "--config.train.steps=3", "--profile_steps=3:4")
    assert again.returncode == 0, again.stderr
    assert list((tmp_path / "tensorboard" / "plugins" / "profile").rglob("*.xplane.pb"))
    assert "resumed from step 2" in again.stderr
    assert Tokenizer.load(tmp_path).codebook_size == 512


@pytest.mark.slow
def test_the_quickstart_keeps_its_promise(tmp_path):
    """At least 20 dB on photographs that it has not seen, more than half of the codes in use."""
    done = run("--config=configs/quickstart.py", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / METRICS_FILE).read_text().splitlines()[-1])
    assert figures["step"] == 400
    assert figures["eval/psnr"] >= 20
    assert figures["eval/codebook_usage"] > 0.5
    assert f"{figures['eval/psnr']:.2f} dB" in done.stdout
