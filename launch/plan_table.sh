#!/usr/bin/env bash
# Plans the train step of the paper's eight networks and systems for the slices that its authors used, without a
# TPU, and prints one table: the compiler's estimates beside the paper's measured speeds. Every row twice: as
# configured, and in a plain form (attention written out, every block computed again, blocks in a loop). Then what
# 50,000 samples of the small networks and their features take.
# One after another, 5 to 30 minutes each on 2 cores, and up to 15 GB.
#
#   bash launch/plan_table.sh                     runs/plan
#   bash launch/plan_table.sh --out=DIR --plain=no
#   bash launch/plan_table.sh --dry-run           prints the commands, as MCM_DRY_RUN=1 does
#
# DIR is relative to the checkout. Every plan is kept there as it is made, so that the same command continues where an
# earlier one stopped, and the table is of all plans there. After a change of the program, or of a library, take
# another directory.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh

out=runs/plan
plain=yes
for argument in "$@"; do
  case "$argument" in
    --out=?*) out="${argument#*=}" ;;
    --plain=yes | --plain=no) plain="${argument#*=}" ;;
    --dry-run) export MCM_DRY_RUN=1 ;;
    *) mcm_refuse "$argument is not an option; there are --out=DIR, --plain=yes|no and --dry-run" ;;
  esac
done
mcm_environment plan

# plan NAME ARGUMENT...
plan() {
  local name="$1"
  shift
  [ -f "$out/$name.json" ] || mcm_run python -m mcm_jax.plan --json="$out/$name.json" "$@" || return
}

mcm_run mkdir -p "$out"
for size in small large; do
  if [ "$size" = small ]; then topology=v5e:8x8; else topology=v5e:16x16; fi
  for resolution in 64 128; do
    for system in ct cd; do
      row=("--config=configs/imagenet$resolution.py:$size,$system,steps=8" "--topology=$topology")
      echo "== imagenet$resolution, $size, $system"
      plan "$size-$resolution-$system" "${row[@]}"
      [ "$plain" = no ] || plan "$size-$resolution-$system-plain" "${row[@]}" --config.model.attention=einsum \
        --config.model.remat=full --config.model.unroll=False
    done
  done
done
for resolution in 64 128; do
  echo "== imagenet$resolution, small, sampling"
  row=("--config=configs/imagenet$resolution.py:small,cd,steps=8" --topology=v5e:8x8)
  for program in sample features; do
    plan "small-$resolution-$program" "${row[@]}" "--program=$program"
  done
done
echo
mcm_run python -m mcm_jax.plan --table="$out"
