import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import jax
import pytest

from vqrae_jax import main, storage
from vqrae_jax.errors import ConfigError
from vqrae_jax.evaluation.report import METRICS_FILE
from vqrae_jax.inference.location import locate
from vqrae_jax.inference.tokenizer import Tokenizer
from vqrae_jax.preflight import command

ROOT = pathlib.Path(__file__).parents[1]
FLAGS = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"


FORKS = """
import json, os, sys
from vqrae_jax import main
for line in sys.stdin:
    arguments, errors, program = json.loads(line)
    process = os.fork()
    if not process:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
        exec(program)
        sys.argv = ["main", *arguments]
        sys.exit(main.run())
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def run_fork(tmp_path_factory):
    """Returns a function that runs the command in a fork of a process that has imported it: (exit code, stderr).

    The fork executes another program first.
    """
    file = tmp_path_factory.mktemp("forks") / "stderr"
    env = {**os.environ, "XLA_FLAGS": FLAGS}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", FORKS], cwd=ROOT, env=env, **pipes) as server:

        def run(arguments, program=""):
            file.unlink(missing_ok=True)
            server.stdin.write(json.dumps([arguments, str(file), program]) + "\n")
            server.stdin.flush()
            return int(server.stdout.readline()), file.read_text()

        yield run
        server.stdin.close()


def run(*arguments, **env):
    """The command as a user types it, on one device."""
    env = {**os.environ, "XLA_FLAGS": FLAGS, "COLUMNS": "1000", **env}  # a table does not break long paths
    command = [sys.executable, "-m", "vqrae_jax.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/quickstart.py"], "--workdir"),
        (["--config=configs/absent.py", "--workdir=/tmp/x"], "configs/absent.py"),
        (["--config=configs/quickstart.py", "--wordkir=/tmp/x"], "'wordkir'"),
        (["--config=configs/quickstart.py", "--config.train.steps=many"], "--config.train.steps=many"),
        (["--config=configs/quickstart.py", "--workdir=/tmp/x", "--config.mesh.model=3"], "mesh.model=3"),
        (["--config=configs/quickstart.py", "--config.model.encoder_params.architecture.hiden_size=4"], "hidden_size"),
        (["--config=configs/quickstart.py", "--config.model.num_embedings=4"], "model.num_embeddings"),
        (["--config=configs/quickstart.py", "--workdir=/tmp/x", "--config.data.batch_size=0"], "data.batch_size=0"),
        (["--config=configs/quickstart.py", "--workdir=/tmp/x", "--profile_steps=3"], "--profile_steps='3'"),
        (["--config=configs/quickstart.py", "--workdir=/tmp/x", "--processes=2"], "--processes=2"),
        (
            ["--config=configs/quickstart.py", "--workdir=/tmp/x", "--processes=1", "--process=1"],
            "error (process 1): --process=1",
        ),
        (["--config=configs/quickstart.py", "--workdir=/tmp/x", "--step=3"], "--step=3"),
        (["--config=configs/quickstart.py:3", "--workdir=/tmp/x"], "quickstart.py, line 12"),
    ],
)
def test_invalid_settings_are_one_message_and_exit_code_2(run_fork, arguments, message):
    assert_one_message(*run_fork(arguments), 2, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/quickstart.py", "--workdir=s3://bucket/run"], "s3://bucket/run"),
        (["--config=configs/dinov2_b.py", "--workdir=/tmp/x", "--config.data.path=/tmp/absent"], "/tmp/absent"),
    ],
)
def test_other_input_errors_are_one_message_and_exit_code_1(run_fork, arguments, message):
    assert_one_message(*run_fork(arguments), 1, message)


def assert_one_message(code, stderr, expected_code, message):
    assert code == expected_code
    assert message in stderr
    assert len(re.findall(r"^error(?: \(process \d\))?: ", stderr, re.M)) == 1
    assert "Traceback" not in stderr
    assert len([line for line in stderr.strip().splitlines() if " INFO " not in line]) == 1


def written(path, config):
    """A config file that gives `config`."""
    values = config.model_dump()
    path.write_text(f"import ml_collections\n\ndef get_config():\n    return ml_collections.ConfigDict({values!r})\n")
    return path


def test_a_checkpoint_brings_its_model_section(untrained, trained, tmp_path, parsed_flags):
    """Fields of the command line prevail. A run that is resumed has the section in its own checkpoints."""
    path = untrained().save_pretrained(tmp_path / "folder")
    flags = ["--config=configs/vqrae_dinov2_b.py", f"--checkpoint={path}", "--config.model.encoder_params.fusion=sum"]
    for workdir, model in ((tmp_path / "new", untrained().config), (trained, locate(trained).config)):
        with parsed_flags([*flags, f"--workdir={workdir}"]):
            config = main._load_config()
        params = model.encoder_params.model_copy(update={"fusion": "sum"})
        expected = {"encoder_params": params, "dtype": "bfloat16", "remat": True}
        for name in ("decoder_config_path", "decoder_architecture"):  # a folder has the second in place of the first
            expected[name] = getattr(config.model, name)
        assert config.model == model.model_copy(update=expected)
        assert config.train.start_from == str(path)
        assert config.loss.perceptual.weight == 1
        frozen = "--config.train.trainable=('decoder',)"
        with parsed_flags([*flags, f"--workdir={workdir}", frozen]):
            assert main._load_config().model.dtype == model.dtype  # codes keep their hash
    with parsed_flags([*flags, "--workdir=x", "--config.train.start_from=y"]), pytest.raises(ConfigError) as error:
        main._load_config()
    assert error.value.field == "train.start_from"


@pytest.mark.slow
def test_steps_of_the_command_line_make_a_short_trial(tmp_path, tiny):
    """The config file counts in epochs; one line of the log says that the steps replace them."""
    file = written(tmp_path / "epochs.py", tiny(train={"epochs": 2.0}))
    done = run(f"--config={file}", f"--workdir={tmp_path / 'run'}", "--config.train.steps=1")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("train.epochs=2.0") == 1
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / METRICS_FILE).read_text().splitlines()][-1] == 1


@pytest.mark.parametrize(
    ("json", "workdir", "file"),
    [("~", "run", "preflight.json"), ("~/x.v2", None, "x.v2"), (None, "~/run", "run/preflight.json")],
)
def test_the_report_of_preflight_is_a_file_or_in_a_folder(tmp_path, monkeypatch, json, workdir, file):
    paths = []

    def preflight(config, topology, alternatives, path):
        paths.append(storage.resolve_path(path))
        return types.SimpleNamespace(fits=True)

    values = {"JSON": json, "WORKDIR": workdir, "TOPOLOGY": "cpu:8", "ALTERNATIVES": 0}
    for name, value in values.items():
        monkeypatch.setattr(main, name, types.SimpleNamespace(value=value))
    monkeypatch.setattr(main, "_load_config", lambda: None)
    monkeypatch.setattr(command, "preflight", preflight)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main._preflight()
    assert paths == [tmp_path / file]


@pytest.mark.parametrize("error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")])
def test_too_little_memory_is_one_message(error, capsys):
    main._report(error)
    assert re.fullmatch(r"error: out of memory .*data\.batch_size.*\n", capsys.readouterr().err)


INTERRUPTED = """
import signal
from vqrae_jax.train.tokenizer import TokenizerTask

def step(*_):
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)

TokenizerTask.step = step
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workdir", "message"), [("new", "interrupted before"), ("begun", "interrupted; step 3 is saved")]
)
def test_ctrl_c_while_the_first_step_is_traced_is_one_sentence(run_fork, tmp_path, trained, tiny, workdir, message):
    """The second interrupt, which does not wait for a step."""
    config = written(tmp_path / "config.py", tiny(train={"steps": 4}))
    shutil.copytree(trained, tmp_path / "begun")
    code, stderr = run_fork([f"--config={config}", f"--workdir={tmp_path / workdir}"], INTERRUPTED)
    assert code == 130, stderr
    assert stderr.splitlines()[-1].startswith(message)
    assert "Traceback" not in stderr


@pytest.mark.slow
def test_the_quickstart_shortened(tmp_path):
    """The README's first command, with fewer steps, and the profiler."""
    short = [f"--config.train.{name}=2" for name in ("steps", "evaluate_every", "checkpoint_every", "log_every")]
    command = ["--config=configs/quickstart.py", f"--workdir={tmp_path}", *short]
    done = run(*command, "--profile_steps=2:3")
    assert done.returncode == 0, done.stderr
    for row in ("validation PSNR", "codebook usage", "perplexity", "reconstructions.png", METRICS_FILE):
        assert row in done.stdout
    assert list((tmp_path / "tensorboard" / "plugins" / "profile").rglob("*.xplane.pb"))
    assert Tokenizer.load(tmp_path).codebook_size == 1024


@pytest.mark.slow
def test_the_quickstart_keeps_its_promise(tmp_path):
    """At least 25 dB on photographs that it has not seen, more than half of the codes in use."""
    done = run("--config=configs/quickstart.py", f"--workdir={tmp_path}", JAX_DISABLE_MOST_OPTIMIZATIONS="0")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / METRICS_FILE).read_text().splitlines()[-1])
    assert figures["step"] == 400
    assert figures["eval/psnr"] >= 25
    assert figures["eval/codebook_usage"] > 0.5
    assert f"{figures['eval/psnr']:.2f} dB" in done.stdout
