#!/usr/bin/env bash
# Trains to the end: creates the pod, sets it up and trains, as often as it is preempted. Needs its own terminal (tmux).
#
#   PROJECT=my-project ZONE=us-west4-a NAME=tokenizer TYPE=v5litepod-256 SPOT=1 BUCKET=my-bucket \
#     launch/tpu/watch.sh --config=configs/dinov2_b.py --workdir=/mnt/bucket/runs/one
#
# PROJECT, ZONE, NAME, TYPE, SPOT, RUNTIME, SERVICE_ACCOUNT, WAIT, DRY_RUN: see launch/tpu/create.sh
# BUCKET     see launch/tpu/setup.sh
# CRASHES    how often in a row training may fail on a healthy pod before this gives up (default 3)
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/pod.sh"
need TYPE BUCKET

crashes=0
while true; do
  status=0
  "$here/create.sh" || status=$?
  [[ "$status" == 3 ]] && continue
  [[ "$status" == 0 ]] || exit "$status"
  if "$here/setup.sh"; then
    "$here/train.sh" "$@" || status=$?
    [[ "$status" == 2 ]] && exit 2 # what was asked for is wrong
    if [[ "$status" == 0 ]]; then
      echo "training is done; the pod still costs: $here/delete.sh" >&2
      exit
    fi
  fi
  state=$(pod_state)
  if [[ "$state" == READY ]]; then
    crashes=$((crashes + 1))
    echo "training failed on a healthy pod, $crashes in a row" >&2
    ((crashes < ${CRASHES:-3})) || exit 1
  else
    crashes=0
    echo "the pod is ${state:-gone}: once more" >&2
  fi
  sleep "${WAIT:-30}"
done
