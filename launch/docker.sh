#!/usr/bin/env bash
# Builds an image from the Dockerfile; optionally pushes or runs it.
#
#   bash launch/docker.sh                                                   builds mcm_jax:cpu
#   MCM_ACCELERATOR=tpu bash launch/docker.sh --image=REGISTRY/mcm_jax:tpu --push       for launch/gke/train.sh
#   MCM_ACCELERATOR=gpu bash launch/docker.sh -- python -m mcm_jax.train --config=openmoji:teacher \
#       --workdir=runs/teacher
#   bash launch/docker.sh --dry-run ...                                     only prints the commands
#
# The command after -- runs in the image, with this checkout's data/ and runs/.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh

accelerator="${MCM_ACCELERATOR:-cpu}" image='' push=''
while [ $# -gt 0 ]; do
  case "$1" in
    --image=?*) image="${1#*=}" ;;
    --push) push=yes ;;
    --dry-run) export MCM_DRY_RUN=1 ;;
    --) shift && break ;;
    *) mcm_refuse "$1 is not an option; available: --image=NAME, --push, --dry-run and -- COMMAND" ;;
  esac
  shift
done
case "$accelerator" in
  cpu) devices=() ;;
  gpu | gpu13) devices=(--gpus=all --ipc=host) ;;
  tpu) devices=(--privileged --network=host) ;;
  *) mcm_refuse "MCM_ACCELERATOR=$accelerator must be cpu, gpu, gpu13 or tpu" ;;
esac
image="${image:-mcm_jax:$accelerator}"
if [ -z "${MCM_DRY_RUN:-}" ] && ! command -v docker >/dev/null; then
  mcm_refuse "docker is not installed; see https://docs.docker.com/engine/install"
fi

mcm_run docker build --build-arg "ACCELERATOR=$accelerator" --tag "$image" .
[ -z "$push" ] || mcm_run docker push "$image"
if [ $# -gt 0 ]; then
  mcm_run mkdir -p data runs
  # --init forwards signals, so that Ctrl-C saves a checkpoint; --user makes you the owner of the files.
  mcm_run docker run --rm --init --user "$(id -u):$(id -g)" "${devices[@]}" \
    --volume "$PWD/data:/opt/mcm_jax/data" --volume "$PWD/runs:/opt/mcm_jax/runs" "$image" "$@"
fi
