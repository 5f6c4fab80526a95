#!/usr/bin/env bash
# Trains on this machine, and again where it stopped if it is run again.
#
#   launch/local.sh --config=configs/dinov2_b.py --workdir=runs/one --config.data.path=/data/train
#
# Paths are those of the folder it is called from.
#
# PROCESSES  how many processes share the work over loopback (default 1: one process drives every device it finds)
# PORT       of process 0, for several processes (default 12345)
# PYTHON     the interpreter (default python)
# DRY_RUN=1  only prints what it would run
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

[[ -n "$(value config "$@")" && -n "$(value workdir "$@")" ]] || {
  echo "error: --config=FILE and --workdir=FOLDER are needed" >&2
  exit 2
}
PROCESSES=${PROCESSES:-1}
PORT=${PORT:-12345}
[[ "$PROCESSES" =~ ^[1-9][0-9]*$ ]] || { echo "error: PROCESSES=$PROCESSES is no number above 0" >&2; exit 2; }
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$checkout${PYTHONPATH:+:$PYTHONPATH} # where python -m finds the package
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1} # large pages: a step on CPUs is 7 % shorter

train=("${PYTHON:-python}" -m vqrae_jax.main "$@")
if [[ "$PROCESSES" == 1 ]]; then
  run exec "${train[@]}" # so that a signal to this script is one to the training
  exit
fi

children=()
# One that fails takes the others with it, as does a signal to this script; who waits for it waits until they have saved.
trap 'kill "${children[@]}" 2>/dev/null || true; wait' EXIT
for ((i = 0; i < PROCESSES; i++)); do
  run exec "${train[@]}" --coordinator="localhost:$PORT" --processes="$PROCESSES" --process="$i" &
  children+=($!)
done
for _ in "${children[@]}"; do
  wait -n
done
