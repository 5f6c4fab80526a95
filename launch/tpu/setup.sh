#!/usr/bin/env bash
# Puts this checkout's last commit and its requirements on every worker of a pod; run again, it brings them up to date.
#
#   PROJECT=my-project ZONE=us-west4-a NAME=tokenizer launch/tpu/setup.sh
#
# PROJECT, ZONE, NAME, DRY_RUN: see launch/tpu/pod.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/pod.sh"

archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[[ -z "$(git status --porcelain --untracked-files=no)" ]] || echo "note: changes that are not committed stay here" >&2
run git archive --format=tar.gz --output="$archive" HEAD
run gcloud compute tpus tpu-vm scp "$archive" "$NAME:vqrae_jax.tar.gz" "${where[@]}" --worker=all --quiet
# uv brings the Python that the runtime image does not have.
on_all 'set -e
  mkdir -p ~/vqrae_jax && tar -xzf ~/vqrae_jax.tar.gz -C ~/vqrae_jax && cd ~/vqrae_jax
  command -v ~/.local/bin/uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  [ -d .venv ] || ~/.local/bin/uv venv --quiet --python 3.12
  ~/.local/bin/uv pip install --quiet ".[tpu]"'
