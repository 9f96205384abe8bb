#!/usr/bin/env bash
# Text to image on a small scale: draws captioned avatars, trains a diffusion teacher, distils its guided prediction
# and then a student of 4 steps, scores all three by the attributes that their samples show, and draws captions whose
# combinations never occur in training. Takes about 20 minutes on 2 cores, including the installation.
#
#   bash launch/smoke_text.sh                          writes to runs/smoke_text, training seed 0
#   bash launch/smoke_text.sh --runs=DIR --seed=1      another directory, another training seed
#   MCM_ACCELERATOR=gpu bash launch/smoke_text.sh      installs JAX for CUDA and runs there
#   bash launch/smoke_text.sh --dry-run                only prints the commands, as MCM_DRY_RUN=1 does
#
# The same command continues an interrupted one.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh

runs=runs/smoke_text
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

# Set after --config.
settings=(--config.seed="$seed" --config.data.resolution=16 --config.training.sample_every_steps=0)

mcm_run python -m mcm_jax.prepare --dataset=avatars --resolution=16 --num=20000 --caption_length=40 --classifier
echo "== teacher"
mcm_run python -m mcm_jax.train --config=avatars:teacher "${settings[@]}" --config.training.num_steps=2000 \
  --workdir="$here/teacher"
echo "== guidance"
mcm_run python -m mcm_jax.train --config=avatars:guidance "${settings[@]}" --config.training.num_steps=300 \
  --config.teacher_checkpoint="$here/teacher" --workdir="$here/guidance"
echo "== cd, 4 steps"
mcm_run python -m mcm_jax.train --config=avatars:cd,steps=4 "${settings[@]}" --config.training.num_steps=300 \
  --config.teacher_checkpoint="$here/guidance" --workdir="$here/cd4"
echo "== evaluation"
workdirs="$here/teacher,$here/guidance,$here/cd4"
mcm_run python -m mcm_jax.evaluate --workdir="$workdirs" --captions=test,heldout --num=256 --untrained_num=0
mcm_run python -m mcm_jax.report --runs="$runs"
mcm_run python -m mcm_jax.report --prompts=launch/prompts.txt --runs="$workdirs" --out="$runs/prompts.png"

[ -z "${MCM_DRY_RUN:-}" ] || exit 0
minutes=$(((SECONDS - started + 59) / 60))
cat <<EOF

Done in $minutes minutes. Next:
  your own prompts  python -m mcm_jax.sample --workdir=$here/cd4 --prompt="a red planet" --num=8 --out=planets.png
  32x32             docs/text_to_image.md
(first activate the environment: source .venv/bin/activate)
EOF
