#!/usr/bin/env bash
# Puts this checkout's last commit and its requirements on every worker of a pod, and a bucket at /mnt/bucket; run again,
# it brings them up to date.
#
#   PROJECT=my-project ZONE=us-west4-a NAME=tokenizer BUCKET=my-bucket launch/tpu/setup.sh
#
# PROJECT, ZONE, NAME, DRY_RUN: see launch/tpu/pod.sh
# BUCKET     of Google Cloud Storage, for checkpoints and logs: workers share no disk
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/pod.sh"
need BUCKET

archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[[ -z "$(git status --porcelain --untracked-files=no)" ]] || echo "note: changes that are not committed stay here" >&2
run git archive --format=tar.gz --output="$archive" HEAD
run gcloud compute tpus tpu-vm scp "$archive" "$NAME:vqrae_jax.tar.gz" "${where[@]}" --worker=all --quiet
# uv brings the Python that the runtime image does not have; torch reads the recipes' .pth weights, the CPU's is enough.
on_all 'set -e
  mkdir -p ~/vqrae_jax && tar -xzf ~/vqrae_jax.tar.gz -C ~/vqrae_jax && cd ~/vqrae_jax
  command -v ~/.local/bin/uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  [ -d .venv ] || ~/.local/bin/uv venv --quiet --python 3.12
  ~/.local/bin/uv pip install --quiet --torch-backend=cpu "torch>=2.6"
  ~/.local/bin/uv pip install --quiet ".[tpu,gcs]"'
on_all "set -e
  mountpoint -q /mnt/bucket && exit
  if ! command -v gcsfuse >/dev/null; then
    from=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
    curl -fsSL \$from/doc/apt-key.gpg | sudo tee \$key >/dev/null
    echo \"deb [signed-by=\$key] \$from gcsfuse-\$(lsb_release -cs) main\" | sudo tee /etc/apt/sources.list.d/gcsfuse.list
    sudo apt-get update -q && sudo apt-get install -qy gcsfuse
  fi
  sudo mkdir -p /mnt/bucket && sudo chown \$USER /mnt/bucket
  gcsfuse --implicit-dirs $BUCKET /mnt/bucket"
