#!/usr/bin/env bash
# Trains on every worker of a pod and exits with the status of the training. Run again, it resumes.
#
#   PROJECT=my-project ZONE=us-west4-a NAME=tokenizer \
#     launch/tpu/train.sh --config=configs/vqrae_dinov2_b.py --workdir=/mnt/bucket/runs/one
#
# PROJECT, ZONE, NAME, DRY_RUN: see launch/tpu/pod.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/pod.sh"
[[ -n "$(flag_value config "$@")" && "$(flag_value workdir "$@")" =~ ^(/mnt/bucket|gs:/)/ ]] || {
  echo "error: --config=FILE and --workdir=/mnt/bucket/FOLDER (or gs://...) are required, because workers share no disk" >&2
  exit 2
}

# A run that survived a lost connection still holds the chips; it first gets the signal to save and exit.
run_on_workers "cd ~/vqrae_jax
  before=\$(cat train.pid 2>/dev/null || true)
  if grep -qs vqrae_jax.main \"/proc/\$before/cmdline\"; then
    kill -TERM \$before
    while kill -0 \$before 2>/dev/null; do sleep 1; done
  fi
  echo \$\$ > train.pid
  [ ! -f ~/vqrae_jax.env ] || . ~/vqrae_jax.env
  exec .venv/bin/python -m vqrae_jax.main $(printf '%q ' "$@")"
