#!/usr/bin/env bash
# Plans the train steps whose speed the paper reports (ImageNet in two sizes, two resolutions, CT and CD; text to image)
# for the TPU slices that its authors used, without a TPU, and prints one table: the compiler's estimates beside the
# paper's measured speeds. Each of its rows of ImageNet appears twice: as configured, and in a plain form (attention
# without a fused kernel, every block recomputed, blocks in a loop). Then it plans a smaller network, the distillation of
# published networks, sampling from the small networks, and computing features of the samples. Makes the plans one after
# another; each takes 5 to 30 minutes on 2 cores and up to 15 GB of memory.
#
#   bash launch/plan_table.sh                     writes to runs/plan
#   bash launch/plan_table.sh --out=DIR --plain=no
#   bash launch/plan_table.sh --dry-run           only prints the commands, as MCM_DRY_RUN=1 does
#
# DIR is relative to the checkout. Each plan is saved there when it is done, the same command continues an interrupted
# one, and the table contains all plans in DIR. After changing the code or a library, use another directory.
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
    *) mcm_refuse "$argument is not an option; available: --out=DIR, --plain=yes|no and --dry-run" ;;
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
      row=("--config=imagenet$resolution:$size,$system,steps=8" "--topology=$topology")
      echo "== imagenet$resolution, $size, $system"
      plan "$size-$resolution-$system" "${row[@]}"
      [ "$plain" = no ] || plan "$size-$resolution-$system-plain" "${row[@]}" --config.model.attention=einsum \
        --config.model.remat=full --config.model.unroll=False
    done
  done
done
echo "== the network for eight chips, which is not the paper's"
for system in teacher cd,steps=4; do
  plan "mini-${system%%,*}" "--config=imagenet64:mini,$system" --topology=v5e:2x4
done
echo "== text to image, cd of the guidance-distilled and of the guided teacher"
row=("--config=text_to_image:cd,steps=4" --topology=v5e:16x16)
plan text-to-image-cd "${row[@]}"
plan text-to-image-cd-guided "${row[@]}" --config.consistency.teacher_guidance=0.5
echo "== cd of published networks"
for network in edm2-s adm64; do
  row=("--config=imagenet64:$network,cd,steps=4")
  plan "$network-8" "${row[@]}" --topology=v5e:2x4
  plan "$network-64" "${row[@]}" --topology=v5e:8x8 --config.training.accumulation_steps=1
done
for resolution in 64 128; do
  echo "== imagenet$resolution, small, sampling"
  row=("--config=imagenet$resolution:small,cd,steps=8" --topology=v5e:8x8)
  for program in sample features; do
    plan "small-$resolution-$program" "${row[@]}" "--program=$program"
  done
done
echo
mcm_run python -m mcm_jax.plan --table="$out"
