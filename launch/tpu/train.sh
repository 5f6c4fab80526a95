#!/usr/bin/env bash
# Trains on every worker of a pod, and again where it stopped if it is run again; ends with the training's exit status.
#
#   PROJECT=my-project ZONE=us-west4-a NAME=tokenizer \
#     launch/tpu/train.sh --config=configs/dinov2_b.py --workdir=/mnt/bucket/runs/one
#
# PROJECT, ZONE, NAME, DRY_RUN: see launch/tpu/pod.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/pod.sh"
[[ -n "$(value config "$@")" && "$(value workdir "$@")" =~ ^(/mnt/bucket|gs:/)/ ]] || {
  echo "error: --config=FILE and --workdir=/mnt/bucket/FOLDER (or gs://...) are needed: workers share no disk" >&2
  exit 2
}

# A run that a lost connection left behind would keep the chips: it is asked to save and leave first.
on_all "cd ~/vqrae_jax
  before=\$(cat train.pid 2>/dev/null || true)
  if grep -qs vqrae_jax.main \"/proc/\$before/cmdline\"; then
    kill -TERM \$before
    while kill -0 \$before 2>/dev/null; do sleep 1; done
  fi
  echo \$\$ > train.pid
  exec .venv/bin/python -m vqrae_jax.main $(printf '%q ' "$@")"
