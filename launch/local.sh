#!/usr/bin/env bash
# Trains on this machine. Run again, it resumes from the newest checkpoint.
#
#   launch/local.sh --config=configs/vqrae_dinov2_b.py --workdir=runs/one --config.data.path=/data/train
#
# Relative paths start at the current folder.
#
# PROCESSES  number of processes on this machine (default: 1, which uses all devices)
# PORT       port of process 0, for several processes (default: 12345)
# PYTHON     Python interpreter (default: python)
# DRY_RUN=1  print the commands without running them
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

[[ -n "$(flag_value config "$@")" && -n "$(flag_value workdir "$@")" ]] || {
  echo "error: --config=FILE and --workdir=FOLDER are required" >&2
  exit 2
}
PROCESSES=${PROCESSES:-1}
PORT=${PORT:-12345}
[[ "$PROCESSES" =~ ^[1-9][0-9]*$ ]] || { echo "error: PROCESSES=$PROCESSES: must be a positive integer" >&2; exit 2; }
if [[ "$PROCESSES" != 1 ]] && (exec 3<>"/dev/tcp/localhost/$PORT") 2>/dev/null; then # its run would abort
  echo "error: PORT=$PORT is in use, perhaps by another run; choose another" >&2
  exit 1
fi
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$checkout${PYTHONPATH:+:$PYTHONPATH} # python -m imports the package from the checkout
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1} # large pages make a step on CPUs 7 % faster

train=("${PYTHON:-python}" -m vqrae_jax.main "$@")
if [[ "$PROCESSES" == 1 ]]; then
  run exec "${train[@]}" # the training receives signals to this script
  exit
fi

children=()
# If one process fails or this script gets a signal, all processes end; the script waits until they have saved.
trap 'kill "${children[@]}" 2>/dev/null || true; wait' EXIT
for ((i = 0; i < PROCESSES; i++)); do
  run exec "${train[@]}" --coordinator="localhost:$PORT" --processes="$PROCESSES" --process="$i" &
  children+=($!)
done
for _ in "${children[@]}"; do
  wait -n
done
