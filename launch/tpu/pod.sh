# Sourced by the scripts of this folder: the variables that name a pod, and what is asked of gcloud more than once.
#
# PROJECT, ZONE  of Google Cloud
# NAME           of the pod, chosen by you
# TYPE           accelerator type, for example v4-32, v5litepod-256, v5p-128, v6e-64
# DRY_RUN=1      only prints what it would run
source "$(dirname "${BASH_SOURCE[0]}")/../steps.sh"
need PROJECT ZONE NAME
where=(--project="$PROJECT" --zone="$ZONE")

# The state of the request: WAITING_FOR_RESOURCES, ACTIVE, SUSPENDED, FAILED, ...; nothing if there is none.
request_state() {
  [[ "${DRY_RUN:-0}" == 1 ]] ||
    gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)' 2>/dev/null || true
}

# The state of the machines: READY, PREEMPTED, ...; nothing if there are none.
pod_state() {
  [[ "${DRY_RUN:-0}" == 1 ]] ||
    gcloud compute tpus tpu-vm describe "$NAME" "${where[@]}" --format='value(state)' 2>/dev/null || true
}

# on_all COMMAND: runs it on every worker; its exit status is that of the first that fails.
on_all() {
  run gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --quiet --command="$1"
}
