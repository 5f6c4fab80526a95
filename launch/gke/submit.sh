#!/usr/bin/env bash
# Starts a training as a JobSet on Google Kubernetes Engine, which restarts it after a preemption; one that runs stays.
#
#   NAME=tokenizer IMAGE=us-docker.pkg.dev/my-project/images/vqrae:tpu CONFIG=configs/dinov2_b.py \
#     BUCKET=my-bucket WORKDIR=/mnt/bucket/runs/one TOPOLOGY=16x16 \
#     launch/gke/submit.sh tpu --config.data.path=gs://my-bucket/train
#
# NAME, IMAGE, CONFIG, WORKDIR  the JobSet's name, what to run and where to
# BUCKET       of Google Cloud Storage, at /mnt/bucket in every pod: they share no disk
# TOPOLOGY     tpu: chips of the slice, as in --topology of preflight
# ACCELERATOR  tpu: tpu-v4-podslice, tpu-v5-lite-podslice (default), tpu-v5p-slice, tpu-v6e-slice
#              gpu: nvidia-h100-80gb (default), nvidia-h200-141gb, ...
# NODES        gpu: how many nodes of eight GPUs
# SERVICE_ACCOUNT  of Kubernetes, with rights on the bucket (default: default)
# RESTARTS     after how many failures it gives up (default 100); at once where what was asked for is wrong
# DRY_RUN=1    prints the JobSet and what it would run
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/../steps.sh"
need NAME IMAGE CONFIG WORKDIR BUCKET
command -v envsubst > /dev/null || { echo "error: envsubst is needed (gettext-base)" >&2; exit 2; }
kind=${1:-}
case "$kind" in
  tpu)
    need TOPOLOGY
    [[ "$TOPOLOGY" =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || {
      echo "error: TOPOLOGY=$TOPOLOGY is no slice of chips, as in 16x16 or 4x4x4" >&2
      exit 2
    }
    chips=$((${TOPOLOGY//x/*}))
    export ACCELERATOR=${ACCELERATOR:-tpu-v5-lite-podslice}
    export CHIPS=$((chips < 4 ? chips : 4)) # of one host; slices of v5e and v6e with eight have hosts of eight
    [[ "$TOPOLOGY" == 2x4 ]] && CHIPS=8
    export HOSTS=$((chips / CHIPS))
    ;;
  gpu)
    need NODES
    [[ "$NODES" =~ ^[1-9][0-9]*$ ]] || { echo "error: NODES=$NODES is no number above 0" >&2; exit 2; }
    export ACCELERATOR=${ACCELERATOR:-nvidia-h100-80gb} NODES
    ;;
  *) echo "error: launch/gke/submit.sh tpu, or gpu" >&2; exit 2 ;;
esac
# What follows the platform is for the training: in quotes of YAML, and every $ twice, as Kubernetes replaces $(NAME).
quoted() {
  local argument escape=\\
  for argument in "$@"; do
    argument=${argument//"$escape"/"$escape$escape"}
    argument=${argument//\"/"$escape\""}
    argument=${argument//$'\n'/"${escape}n"}
    printf ', "%s"' "${argument//\$/\$\$}"
  done
}
ARGUMENTS=$(quoted "${@:2}")

export NAME IMAGE CONFIG WORKDIR BUCKET ARGUMENTS TOPOLOGY=${TOPOLOGY:-}
export SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-default} RESTARTS=${RESTARTS:-100}
jobset=$(envsubst < "$here/$kind.yaml") # pods' own variables are written $(NAME), which envsubst leaves alone
[[ "${DRY_RUN:-0}" == 1 ]] && echo "$jobset"
run kubectl apply -f - <<< "$jobset"
