#!/usr/bin/env bash
# Installs the last commit of this checkout on every worker of a pod and mounts a bucket at /mnt/bucket. Run again, it
# updates the installation.
#
#   PROJECT=my-project ZONE=us-west4-a NAME=tokenizer BUCKET=my-bucket launch/tpu/setup.sh
#
# PROJECT, ZONE, NAME, DRY_RUN: see launch/tpu/pod.sh
# BUCKET     bucket of Google Cloud Storage for checkpoints and logs, because workers share no disk
# PASS       variables that the training receives if they are set (default: HF_TOKEN WANDB_API_KEY)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/pod.sh"
require BUCKET

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
archive=$scratch/vqrae_jax.tar.gz variables=$scratch/vqrae_jax.env
export_line() { printf 'export %s=%q\n' "$1" "$2"; }
(umask 077 && secrets export_line > "$variables") # scp keeps the mode
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[[ -z "$(git status --porcelain --untracked-files=no)" ]] || echo "warning: uncommitted changes are not copied" >&2
run git archive --format=tar.gz --output="$archive" HEAD
run gcloud compute tpus tpu-vm scp "$archive" "$variables" "$NAME:." "${location[@]}" --worker=all --quiet
# uv installs a newer Python than the runtime image has; PyTorch for CPU reads the .pth weights of the recipes.
run_on_workers 'set -e
  mkdir -p ~/vqrae_jax && tar -xzf ~/vqrae_jax.tar.gz -C ~/vqrae_jax && cd ~/vqrae_jax
  command -v ~/.local/bin/uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  [ -d .venv ] || ~/.local/bin/uv venv --quiet --python 3.12
  ~/.local/bin/uv pip install --quiet --torch-backend=cpu "torch>=2.6"
  ~/.local/bin/uv pip install --quiet ".[train,tpu,gcs,wandb]"'
run_on_workers "set -e
  mountpoint -q /mnt/bucket && exit
  if ! command -v gcsfuse >/dev/null; then
    from=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
    curl -fsSL \$from/doc/apt-key.gpg | sudo tee \$key >/dev/null
    echo \"deb [signed-by=\$key] \$from gcsfuse-\$(lsb_release -cs) main\" | sudo tee /etc/apt/sources.list.d/gcsfuse.list
    sudo apt-get update -q && sudo apt-get install -qy gcsfuse
  fi
  sudo mkdir -p /mnt/bucket && sudo chown \$USER /mnt/bucket
  gcsfuse --implicit-dirs --rename-dir-limit=200000 $BUCKET /mnt/bucket"
