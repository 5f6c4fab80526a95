#!/usr/bin/env bash
# Creates a pod, sets it up and trains, again after every preemption, until the training is done. Run it in tmux.
#
#   PROJECT=my-project ZONE=us-west4-a NAME=tokenizer TYPE=v5litepod-256 SPOT=1 BUCKET=my-bucket \
#     launch/tpu/watch.sh --config=configs/vqrae_dinov2_b.py --workdir=/mnt/bucket/runs/one
#
# PROJECT, ZONE, NAME, TYPE, SPOT, RUNTIME, SERVICE_ACCOUNT, WAIT, DRY_RUN: see launch/tpu/create.sh
# BUCKET     see launch/tpu/setup.sh
# CRASHES    consecutive failures on a healthy pod after which this gives up (default: 3)
set -euo pipefail
folder=$(dirname "${BASH_SOURCE[0]}")
source "$folder/pod.sh"
require TYPE BUCKET

crashes=0
while true; do
  status=0
  "$folder/create.sh" || status=$?
  [[ "$status" == 3 ]] && continue
  [[ "$status" == 0 ]] || exit "$status"
  if "$folder/setup.sh"; then
    "$folder/train.sh" "$@" || status=$?
    [[ "$status" == 2 ]] && exit 2 # the request is invalid
    if [[ "$status" == 0 ]]; then
      echo "training is done; delete the pod, which still costs money: $folder/delete.sh" >&2
      exit
    fi
  fi
  state=$(pod_state)
  if [[ "$state" == READY ]]; then
    crashes=$((crashes + 1))
    echo "training failed on a healthy pod, $crashes time(s) in a row" >&2
    ((crashes < ${CRASHES:-3})) || exit 1
  else
    crashes=0
    echo "the pod is ${state:-gone}: trying again" >&2
  fi
  sleep "${WAIT:-30}"
done
