#!/usr/bin/env bash
# Deletes a pod and its request, if they exist.
#
#   PROJECT=my-project ZONE=us-west4-a NAME=tokenizer launch/tpu/delete.sh
#
# PROJECT, ZONE, NAME, DRY_RUN: see launch/tpu/pod.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/pod.sh"

if [[ "${DRY_RUN:-0}" != 1 && -z "$(request_state)" ]]; then
  echo "no request is named $NAME" >&2
  exit
fi
run gcloud compute tpus queued-resources delete "$NAME" "${location[@]}" --force --quiet
