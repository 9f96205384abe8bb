#!/usr/bin/env bash
# Measures which of the paper's findings hold on two small problems: a closed-form mixture (exact teacher, exact
# distance) and 16x16 OpenMoji (trained teacher, proxy distance). Took half an hour of one core for the mixture, and
# 40 minutes a seed of one core for OpenMoji. Both cores take two thirds as long (three cells compared): 80 minutes for
# three seeds, an estimate. A seed of the choices took another half an hour of one core.
#
#   bash launch/findings.sh                           runs/findings, 3 seeds
#   bash launch/findings.sh --quick                   everything in short: shows that it runs
#   bash launch/findings.sh --choices                 also the choices that the paper leaves open
#   bash launch/findings.sh --problems=mixture --out=DIR --seeds=5
#
# The same command continues where an earlier one stopped. Arguments go to `python -m mcm_jax.findings`.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
mcm_environment
mcm_run python -m mcm_jax.findings "$@"
