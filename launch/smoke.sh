#!/usr/bin/env bash
# Runs everything on a small scale: prepares 16x16 OpenMoji, trains a diffusion teacher, makes CD and CT students of 1
# and 4 steps from it, evaluates all five, and writes one table and one page. Takes about 10 minutes on 2 cores,
# including the installation.
#
#   bash launch/smoke.sh                          writes to runs/smoke, training seed 0
#   bash launch/smoke.sh --runs=DIR --seed=1      another directory, another training seed
#   MCM_ACCELERATOR=gpu bash launch/smoke.sh      installs JAX for CUDA and runs there
#   bash launch/smoke.sh --dry-run                only prints the commands, as MCM_DRY_RUN=1 does
#
# The same command continues an interrupted one.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh

runs=runs/smoke
seed=0
for argument in "$@"; do
  case "$argument" in
    --runs=*) runs="${argument#*=}" ;;
    --seed=*) seed="${argument#*=}" ;;
    --dry-run) export MCM_DRY_RUN=1 ;;
    *) mcm_refuse "$argument is not an option; available: --runs=DIR, --seed=N and --dry-run" ;;
  esac
done
started=$SECONDS
mcm_environment
# All programs share one cache of compiled code, so that later ones start faster.
export MCM_COMPILATION_CACHE="${MCM_COMPILATION_CACHE:-$runs/xla_cache}"
here="$runs/seed$seed"

# Set after --config. The evaluation draws samples of every model, so none are needed during training.
settings=(--config.seed="$seed" --config.training.sample_every_steps=0)

mcm_run python -m mcm_jax.prepare --dataset=openmoji --resolution=16
echo "== teacher"
mcm_run python -m mcm_jax.train --config=openmoji:teacher "${settings[@]}" --workdir="$here/teacher"
workdirs="$here/teacher"
for system in cd ct; do
  for steps in 1 4; do
    echo "== $system, $steps steps"
    mcm_run python -m mcm_jax.train --config="openmoji:$system,steps=$steps" "${settings[@]}" \
      --config.teacher_checkpoint="$here/teacher" --workdir="$here/$system$steps"
    workdirs="$workdirs,$here/$system$steps"
  done
done
echo "== evaluation"
mcm_run python -m mcm_jax.evaluate --workdir="$workdirs" --num=1024 --untrained_num=256
mcm_run python -m mcm_jax.report --runs="$runs"

[ -z "${MCM_DRY_RUN:-}" ] || exit 0
minutes=$(((SECONDS - started + 59) / 60))
cat <<EOF

Done in $minutes minutes. Next:
  more images       python -m mcm_jax.sample --workdir=$here/cd4 --num=64 --out=grid.png
  loss curves       tensorboard --logdir=$here
  your own images   python -m mcm_jax.prepare --dataset=folder --manual_dir=PATH --resolution=32
  all settings      mcm_jax/config/settings.py; change one with --config.SECTION.NAME=VALUE
(first activate the environment: source .venv/bin/activate)
EOF
