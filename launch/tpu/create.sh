#!/usr/bin/env bash
# Requests a TPU pod and waits until it exists. An existing pod is kept, a preempted one is requested again.
#
#   PROJECT=my-project ZONE=us-west4-a NAME=tokenizer TYPE=v5litepod-256 SPOT=1 launch/tpu/create.sh
#
# PROJECT, ZONE, NAME, TYPE, DRY_RUN: see launch/tpu/pod.sh
# SPOT=1     preemptible and cheaper
# RUNTIME    image of the workers (default: depends on the generation)
# SERVICE_ACCOUNT  service account of the workers, with access to the bucket (default: that of the project)
# WAIT       seconds between two checks of the state (default: 30)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/pod.sh"
require TYPE

case "$TYPE" in
  v4-*) default=tpu-ubuntu2204-base ;;
  v5litepod-* | v5e-*) default=v2-alpha-tpuv5-lite ;;
  v5p-*) default=v2-alpha-tpuv5 ;;
  v6e-*) default=v2-alpha-tpuv6e ;;
  *) echo "error: TYPE=$TYPE: must be v4-N, v5litepod-N, v5p-N or v6e-N" >&2; exit 2 ;;
esac

state=$(request_state)
if [[ "$state" =~ ^(SUSPENDED|SUSPENDING|FAILED)$ || ("$state" == ACTIVE && "$(pod_state)" =~ ^(PREEMPTED|TERMINATED)$) ]]; then
  "$(dirname "${BASH_SOURCE[0]}")/delete.sh"
  state=
fi
if [[ -z "$state" ]]; then
  options=(--node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="${RUNTIME:-$default}")
  [[ "${SPOT:-0}" == 1 ]] && options+=(--spot)
  [[ -n "${SERVICE_ACCOUNT:-}" ]] && options+=(--service-account="$SERVICE_ACCOUNT")
  run gcloud compute tpus queued-resources create "$NAME" "${location[@]}" "${options[@]}"
fi

[[ "${DRY_RUN:-0}" == 1 ]] && exit
while state=$(request_state) && [[ "$state" != ACTIVE ]]; do
  [[ "$state" == FAILED ]] && { echo "error: request failed; see gcloud compute tpus queued-resources describe" >&2; exit 1; }
  [[ "$state" =~ ^SUSPEND ]] && { echo "$NAME was preempted before it was ready" >&2; exit 3; }
  echo "$(date +%T) $NAME: ${state:-unknown}" >&2
  sleep "${WAIT:-30}"
done
echo "$NAME is ready" >&2
