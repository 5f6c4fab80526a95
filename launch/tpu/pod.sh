# Variables and functions for the scripts of this folder.
#
# PROJECT, ZONE  project and zone of Google Cloud
# NAME           any name for the pod
# TYPE           accelerator type, for example v4-32, v5litepod-256, v5p-128, v6e-64
# DRY_RUN=1      print the commands without running them
source "$(dirname "${BASH_SOURCE[0]}")/../steps.sh"
require PROJECT ZONE NAME
location=(--project="$PROJECT" --zone="$ZONE")

# Prints the state of the request: WAITING_FOR_RESOURCES, ACTIVE, SUSPENDED, FAILED, ...; nothing without a request.
request_state() {
  [[ "${DRY_RUN:-0}" == 1 ]] ||
    gcloud compute tpus queued-resources describe "$NAME" "${location[@]}" --format='value(state.state)' 2>/dev/null || true
}

# Prints the state of the machines: READY, PREEMPTED, ...; nothing without machines.
pod_state() {
  [[ "${DRY_RUN:-0}" == 1 ]] ||
    gcloud compute tpus tpu-vm describe "$NAME" "${location[@]}" --format='value(state)' 2>/dev/null || true
}

# run_on_workers COMMAND: runs it on every worker; the exit status is that of the first failure.
run_on_workers() {
  run gcloud compute tpus tpu-vm ssh "$NAME" "${location[@]}" --worker=all --quiet --command="$1"
}
