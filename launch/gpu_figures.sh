#!/usr/bin/env bash
# Runs all measurements that need a GPU, in three parts of less than ten minutes each, and writes reports to OUTPUT.
#
#   IMAGES=/data/photographs ENCODER=/data/vit-tiny launch/gpu_figures.sh
#   launch/gpu_figures.sh speed
#
# Arguments: parts to run, of speed, recipe and quality (default: all; quality only if IMAGES is set)
#
# OUTPUT        folder for the reports (default: gpu_figures)
# IMAGES        folder with photographs in train/ and val/, for quality
# ENCODER       folder of a DINOv2-like encoder with 16-pixel patches, for quality (default: random weights)
# TORCH_PYTHON  Python interpreter with torch (CUDA) and transformers (default: PYTHON)
# PYTHON        Python interpreter (default: python)
# DRY_RUN=1     print the commands without running them
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

PYTHON=${PYTHON:-python}
parts=("$@")
if [[ ${#parts[@]} == 0 ]]; then
  parts=(speed recipe)
  [[ -z "${IMAGES:-}" ]] || parts+=(quality)
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for part in "${parts[@]}"; do
  run "$PYTHON" benchmarks/gpu.py "$part" --output="${OUTPUT:-gpu_figures}" --images="${IMAGES:-photographs}" \
    --encoder="${ENCODER:-}" --torch-python="${TORCH_PYTHON:-$PYTHON}"
done
