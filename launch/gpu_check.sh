#!/usr/bin/env bash
# Checks a GPU: installs the package with JAX for CUDA, and PyTorch in an environment of its own; runs the tests marked
# gpu (numbers against the CPU, bfloat16 training, sampling, features); and times train steps, sampling and features of
# ImageNet64 small against PyTorch, eager and compiled, in alternation. Written for one H100 or H200 and 8 minutes after
# the installation.
#
#   bash launch/gpu_check.sh                     writes runs/gpu.json
#   bash launch/gpu_check.sh --out=FILE
#   bash launch/gpu_check.sh --installed         uses python3 as it is, with the extras gpu, test and benchmark
#   bash launch/gpu_check.sh --small             a tiny network and no tests: shows on any machine that the script works
#   bash launch/gpu_check.sh --dry-run           only prints the commands, as MCM_DRY_RUN=1 does
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh

out=runs/gpu.json
installed=
small=()
for argument in "$@"; do
  case "$argument" in
    --out=?*) out="${argument#*=}" ;;
    --installed) installed=1 ;;
    --small) small=(--small --turns=2 --turn_seconds=0.1 --batch_size=4) ;;
    --dry-run) export MCM_DRY_RUN=1 ;;
    *) mcm_refuse "$argument is not an option; available: --out=FILE, --installed, --small and --dry-run" ;;
  esac
done
torch_python=python3
code=0
if [ -z "$installed" ]; then
  # CUDA's libraries have different versions in JAX and in PyTorch.
  torch="${MCM_VENV:-$PWD/.venv}-torch"
  torch_python="$torch/bin/python"
  (MCM_VENV="$torch" MCM_ACCELERATOR=cpu mcm_environment benchmark)
  [ ${#small[@]} -gt 0 ] || export MCM_ACCELERATOR=gpu
  mcm_environment test
fi
if [ ${#small[@]} -eq 0 ]; then
  export MCM_TEST_GPU=1
  mcm_run python3 -m pytest tests/test_gpu.py || code=$?
fi
# The times are worth having if a test has failed.
mcm_run python3 -m tests.benchmarks.gpu --out="$out" --torch_python="$torch_python" ${small[@]+"${small[@]}"} || code=$?
exit "$code"
