#!/usr/bin/env bash
# Plans one train step (CT of the small ImageNet64 network) for slices of 8 to 256 TPU v5e chips, without a TPU, and
# prints how the estimates change with the number of chips: once with 32 images per chip, and once with 2048 images in
# total (accumulated in parts of at most 32 images per chip). To compile faster, blocks run in a loop and are recomputed
# for the gradient; this step is slower than that of plan_table.sh.
# Makes eleven plans, one after another; each takes some minutes on 2 cores.
#
#   bash launch/plan_scaling.sh                   writes to runs/scaling
#   bash launch/plan_scaling.sh --out=DIR
#   bash launch/plan_scaling.sh --dry-run         only prints the commands, as MCM_DRY_RUN=1 does
#
# DIR is relative to the checkout. Each plan is saved there when it is done, and the same command continues an
# interrupted one. After changing the code or a library, use another directory.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh

out=runs/scaling
for argument in "$@"; do
  case "$argument" in
    --out=?*) out="${argument#*=}" ;;
    --dry-run) export MCM_DRY_RUN=1 ;;
    *) mcm_refuse "$argument is not an option; available: --out=DIR and --dry-run" ;;
  esac
done
mcm_environment plan

# plan SHAPE CHIPS IMAGES PARTS
plan() {
  local file="$out/$2-chips-$3-images.json"
  [ -f "$file" ] || mcm_run python -m mcm_jax.plan --json="$file" \
    --config=imagenet64:small,ct,steps=8 --topology="v5e:$1" --config.model.unroll=False \
    --config.model.remat=full --config.mesh.fsdp="$2" --config.training.batch_size="$3" \
    --config.training.accumulation_steps="$4" || return
}

mcm_run mkdir -p "$out"
for shape in 2x4 4x4 4x8 8x8 8x16 16x16; do
  chips=$((${shape%x*} * ${shape#*x}))
  parts=$((64 / chips))
  plan "$shape" "$chips" $((32 * chips)) 1
  [ "$chips" = 64 ] || plan "$shape" "$chips" 2048 $((parts > 1 ? parts : 1))
done
echo
mcm_run python -m mcm_jax.plan --scaling="$out"
