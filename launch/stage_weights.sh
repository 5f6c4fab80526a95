#!/usr/bin/env bash
# Copies the pretrained weights of a config into a bucket, so that pods download nothing from the hub, and prints the
# flags with which a training reads these copies.
#
#   WEIGHTS=$(launch/stage_weights.sh gs://my-bucket/weights --config=configs/vqrae_dinov2_b.py)
#
# Add $WEIGHTS to the command of the training.
#
# HF_TOKEN   token of the hub, for gated weights such as DINOv3
# PYTHON     Python interpreter (default: python)
# DRY_RUN=1  print the command without running it
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

[[ "${1:-}" =~ ^(gs:/)?/ && -n "$(flag_value config "$@")" ]] || {
  echo "error: the arguments must be gs://BUCKET/FOLDER (or /FOLDER) and --config=FILE" >&2
  exit 2
}
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$checkout${PYTHONPATH:+:$PYTHONPATH}
run "${PYTHON:-python}" -m vqrae_jax.main --mode=weights --output="$1" "${@:2}"
