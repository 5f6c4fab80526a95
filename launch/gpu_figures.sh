#!/usr/bin/env bash
# Measures everything that wants a GPU: three commands, each of less than ten minutes. The reports are in OUTPUT.
#
#   IMAGES=/data/photographs ENCODER=/data/vit-tiny launch/gpu_figures.sh
#   launch/gpu_figures.sh speed
#
# PART...       of speed, recipe, pictures (default: all; pictures only where IMAGES is given)
# OUTPUT        folder for the reports (default gpu_figures)
# IMAGES        folder with train/ and val/ of photographs, for `pictures`
# ENCODER       a DINOv2-like hub folder with 16-pixel patches, for `pictures` (default: random weights)
# TORCH_PYTHON  a Python with torch (CUDA) and transformers (default: PYTHON)
# PYTHON        the interpreter (default python)
# DRY_RUN=1     only prints what it would run
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

PYTHON=${PYTHON:-python}
parts=("$@")
if [[ ${#parts[@]} == 0 ]]; then
  parts=(speed recipe)
  [[ -z "${IMAGES:-}" ]] || parts+=(pictures)
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for part in "${parts[@]}"; do
  run "$PYTHON" -m vqrae_jax.benchmark gpu "$part" --output="${OUTPUT:-gpu_figures}" --images="${IMAGES:-photographs}" \
    --encoder="${ENCODER:-}" --torch-python="${TORCH_PYTHON:-$PYTHON}"
done
