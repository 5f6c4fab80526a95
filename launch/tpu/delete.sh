#!/usr/bin/env bash
# Gives a pod and its request back; nothing happens if there is none.
#
#   PROJECT=my-project ZONE=us-west4-a NAME=tokenizer launch/tpu/delete.sh
#
# PROJECT, ZONE, NAME, DRY_RUN: see launch/tpu/pod.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/pod.sh"

if [[ "${DRY_RUN:-0}" != 1 && -z "$(request_state)" ]]; then
  echo "there is no request called $NAME" >&2
  exit
fi
run gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
