#!/usr/bin/env bash
# Starts a training as a JobSet on Google Kubernetes Engine, which restarts it after a preemption. A running JobSet of
# the same name is not changed.
#   NAME=tokenizer IMAGE=us-docker.pkg.dev/my-project/images/vqrae:tpu CONFIG=configs/vqrae_dinov2_b.py \
#     BUCKET=my-bucket WORKDIR=/mnt/bucket/runs/one TOPOLOGY=16x16 \
#     launch/gke/submit.sh tpu --config.data.path=gs://my-bucket/train
# Arguments after the platform (tpu or gpu) are arguments of the training.
# NAME, IMAGE      name of the JobSet, Docker image
# CONFIG, WORKDIR  config file, workdir
# BUCKET       bucket of Google Cloud Storage, mounted at /mnt/bucket in every pod, because pods share no disk
# TOPOLOGY     tpu: shape of the slice, such as 16x16
# ACCELERATOR  tpu: tpu-v4-podslice, tpu-v5-lite-podslice (default), tpu-v5p-slice, tpu-v6e-slice, tpu7x
#              gpu: nvidia-h100-80gb (default), nvidia-h200-141gb, ...
# SLICES       tpu: number of slices, each on a node pool of its own (default: 1); sets mesh.slices
# NODES        gpu: number of nodes with eight GPUs
# SERVICE_ACCOUNT  Kubernetes service account with access to the bucket (default: default)
# RESTARTS     maximum number of restarts (default: 100); an invalid request is not restarted
# PASS         variables that the pods receive as a Secret if they are set (default: HF_TOKEN WANDB_API_KEY)
# DRY_RUN=1    print the JobSet and the command without running it
set -euo pipefail
folder=$(dirname "${BASH_SOURCE[0]}")
source "$folder/../steps.sh"
require NAME IMAGE CONFIG WORKDIR BUCKET
command -v envsubst > /dev/null || { echo "error: envsubst is not installed (package gettext-base)" >&2; exit 2; }
kind=${1:-}
case "$kind" in
  tpu)
    require TOPOLOGY
    [[ "$TOPOLOGY" =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || {
      echo "error: TOPOLOGY=$TOPOLOGY: must be the shape of a slice, such as 16x16 or 4x4x4" >&2
      exit 2
    }
    export SLICES=${SLICES:-1}
    [[ "$SLICES" =~ ^[1-9][0-9]*$ ]] || { echo "error: SLICES=$SLICES: must be a positive integer" >&2; exit 2; }
    [[ "$SLICES" == 1 ]] || set -- "$@" --config.mesh.slices="$SLICES"
    chips=$((${TOPOLOGY//x/*}))
    export ACCELERATOR=${ACCELERATOR:-tpu-v5-lite-podslice}
    export CHIPS=$((chips < 4 ? chips : 4)) # per host; the 2x4 slices of v5e and v6e are one host of eight
    [[ "$TOPOLOGY" == 2x4 ]] && CHIPS=8
    export HOSTS=$((chips / CHIPS))
    ;;
  gpu)
    require NODES
    [[ "$NODES" =~ ^[1-9][0-9]*$ ]] || { echo "error: NODES=$NODES: must be a positive integer" >&2; exit 2; }
    export ACCELERATOR=${ACCELERATOR:-nvidia-h100-80gb} NODES
    ;;
  *) echo "error: the first argument must be tpu or gpu" >&2; exit 2 ;;
esac
encode() { printf '%s: "%s",' "$1" "$(printf %s "$2" | base64 -w0)"; }
ARGUMENTS=$(quote "${@:2}")

export NAME IMAGE CONFIG WORKDIR BUCKET ARGUMENTS TOPOLOGY=${TOPOLOGY:-}
export SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-default} RESTARTS=${RESTARTS:-100}
data=$(secrets encode)
[[ -z "$data" ]] || run kubectl apply -f - <<< "{apiVersion: v1, kind: Secret, metadata: {name: $NAME-env}, data: {$data}}"
jobset=$(envsubst < "$folder/$kind.yaml") # variables of the pods are $(NAME), which envsubst does not replace
[[ "${DRY_RUN:-0}" == 1 ]] && echo "$jobset"
run kubectl apply -f - <<< "$jobset"
