#!/usr/bin/env bash
# Measures which of the paper's findings hold on two small problems: a closed-form mixture (exact teacher, exact
# distance) and 16x16 OpenMoji (trained teacher, proxy distance). On one core, the mixture took half an hour and each
# seed of OpenMoji 40 minutes; on two cores, expect 80 minutes for OpenMoji's three seeds (an estimate). Each seed of
# --choices took another half an hour on one core.
#
#   bash launch/findings.sh                           writes to runs/findings, 3 seeds
#   bash launch/findings.sh --quick                   trains briefly, to check that everything runs
#   bash launch/findings.sh --choices                 also measures choices that the paper leaves open
#   bash launch/findings.sh --methods=mixture         compares methods for few steps instead: three hours on a busy core
#   bash launch/findings.sh --methods=avatars         the same on 32x32 avatars, with one trained teacher
#   bash launch/findings.sh --studies=median,annealing,teachers,one_student
#                                                     measures studies: CT's bias, findings 4 and 6, one student for all
#   bash launch/findings.sh --problems=mixture --out=DIR --seeds=5
#
# The same command continues an interrupted one. Arguments go to `python -m mcm_jax.findings`.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
mcm_environment
mcm_run python -m mcm_jax.findings "$@"
