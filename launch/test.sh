#!/usr/bin/env bash
# Runs the linters, the type checker and all tests in .venv, which it creates if missing. Passes its arguments to pytest:
# bash launch/test.sh -k steps
# Compiled programs are cached in .xla_cache for the next run.
#
#   bash launch/test.sh --fast      skips the tests marked slow, and those on eight devices
#
#   bash launch/test.sh --parity    instead compares features, metrics and networks with those of other packages, which
#                                   it installs with PyTorch into a separate environment, .venv-parity
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
if [ "${1:-}" = --parity ]; then
  shift
  MCM_VENV="${MCM_VENV:-$PWD/.venv}-parity" mcm_environment parity test
  mcm_run python -m pytest tests/parity "$@"
  exit
fi
fast=
if [ "${1:-}" = --fast ]; then
  shift
  set -- -m "not slow" "$@"
  fast=1
fi
mcm_environment test
mcm_run ruff check .
mcm_run ruff format --check .
# Otherwise pyright queries PyPI for a newer version at every start.
export PYRIGHT_PYTHON_IGNORE_WARNINGS=1
mcm_run pyright --pythonpath "$(command -v python)"
mcm_run lint-imports --config setup.cfg
# Two processes: one test compiles while another runs. The longest files come first, see tests/conftest.py.
mcm_run python -m pytest -n "${MCM_TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder "$@"
[ -z "$fast" ] || exit 0
# Exit code 5: none of the tests chosen by the arguments needs eight devices.
MCM_TEST_DEVICES=8 mcm_run python -m pytest -n "${MCM_TEST_PROCESSES:-2}" -m multi_device "$@" || [ $? -eq 5 ]
