#!/usr/bin/env bash
# Injects random faults into tiny training runs, on a local disk and in a bucket (a server of Google Cloud Storage's
# protocol on this machine), in one and two processes, and counts how many the same command brings back. 1,000 faults
# take about an hour on 2 cores. Faults of a full disk need root, as they mount a small file system.
#
#   bash launch/faults.sh                         1,000 faults; writes to runs/faults
#   bash launch/faults.sh --quick                 12 faults, in two minutes; writes to a temporary directory
#   bash launch/faults.sh --faults=100 --out=DIR --workers=4
#
# The same command continues an interrupted one. Arguments go to `python -m tests.faults`.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
mcm_environment test
mcm_run python -m tests.faults "$@"
