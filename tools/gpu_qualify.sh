#!/usr/bin/env bash
# Qualify one GPU machine: tests/gpu, log-prob head, MFU in bfloat16 and FP8, weight sync, numerics; one table at the end,
# and tools/results/<gpu>-<date>.json. A stage that lacks a package or the GPU is reported as not run, by name.
#   tools/gpu_qualify.sh [--stages tests,log_prob_head,...] [--quick]
#   PYTHON=python3            an interpreter that has torch for the GPU and whatever else there is
#   INSTALL=1                 make .venv-gpu from requirements/gpu.txt first (Python 3.12, several GB) and use it
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${INSTALL:-0}" = 1 ]; then
  [ -x .venv-gpu/bin/python ] || "${PYTHON:-python3.12}" -m venv .venv-gpu
  .venv-gpu/bin/pip install --quiet -r requirements/gpu.txt
  # Built from source against the torch that is installed now. Where that fails, its stages are reported as not run.
  .venv-gpu/bin/pip install --quiet --no-build-isolation -r requirements/gpu-build.txt ||
    echo "requirements/gpu-build.txt could not be built on this machine" >&2
  .venv-gpu/bin/pip install --quiet --no-deps --editable .
  PYTHON=.venv-gpu/bin/python
fi
if [ -z "${PYTHON:-}" ]; then
  for candidate in .venv-gpu/bin/python .venv/bin/python python3; do
    command -v "$candidate" > /dev/null && PYTHON=$candidate && break
  done
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "$PYTHON" tools/gpu_qualify.py "$@"
