#!/usr/bin/env bash
# Trains on GKE, on one or more slices of TPU or on nodes with GPUs, as a JobSet (the cluster needs the operator:
# https://jobset.sigs.k8s.io). After a preemption or failure all pods start again from the last checkpoint.
#
#   bash launch/gke/train.sh tpu --name=cd4 --image=REGISTRY/mcm_jax:tpu --claim=mcm --slices=2 \
#       --accelerator=tpu-v5-lite-podslice --topology=4x8 --hosts=8 --chips=4 \
#       -- --config=configs/openmoji.py:teacher --config.data.data_dir=/mnt/mcm/data \
#       --workdir=/mnt/mcm/runs/teacher
#   bash launch/gke/train.sh gpu --name=cd4 --image=REGISTRY/mcm_jax:gpu --claim=mcm \
#       --accelerator=nvidia-h100-80gb --hosts=4 --chips=8 -- ...
#
#   --name=NAME             of the JobSet: lower case, digits and dashes
#   --image=IMAGE           from launch/docker.sh --push
#   --claim=CLAIM           a PersistentVolumeClaim that many nodes can write (Filestore), mounted at /mnt/mcm
#   --accelerator=NAME      label of the nodes: cloud.google.com/gke-tpu-accelerator, or gke-accelerator
#   --topology=TOPOLOGY     tpu: of a slice
#   --slices=N              tpu: how many; default 1
#   --hosts=N --chips=N     nodes of a slice (gpu: in all), and TPU chips or GPUs of each
#   --spot                  on spot nodes
#   --dry-run               prints the manifest instead of applying it
#
# What follows -- goes to `python -m mcm_jax.train`. `kubectl delete jobset NAME` saves a checkpoint and ends it;
# the same command continues.
set -euo pipefail
cd "$(dirname "$0")/../.."
. launch/environment.sh

kind="${1:-}"
case "$kind" in
  tpu | gpu) shift ;;
  *) mcm_refuse "say tpu or gpu first: bash launch/gke/train.sh tpu --name=..." ;;
esac
name='' image='' claim='' accelerator='' topology='' slices=1 hosts='' chips='' spot=''
while [ $# -gt 0 ]; do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --image=*) image="${1#*=}" ;;
    --claim=*) claim="${1#*=}" ;;
    --accelerator=*) accelerator="${1#*=}" ;;
    --topology=*) topology="${1#*=}" ;;
    --slices=*) slices="${1#*=}" ;;
    --hosts=*) hosts="${1#*=}" ;;
    --chips=*) chips="${1#*=}" ;;
    --spot) spot=yes ;;
    --dry-run) export MCM_DRY_RUN=1 ;;
    --) shift && break ;;
    *) mcm_refuse "$1 is not an option; see the head of launch/gke/train.sh (arguments of mcm_jax.train follow --)" ;;
  esac
  shift
done
needed=(name image claim accelerator hosts chips)
[ "$kind" = gpu ] || needed+=(topology)
for option in "${needed[@]}"; do
  [ -n "${!option}" ] || mcm_refuse "--$option=... is missing; see the head of launch/gke/train.sh"
  case "${!option}" in *[!A-Za-z0-9._:/@-]*) mcm_refuse "--$option=${!option} has characters that it can't have" ;; esac
done
# A pod's name adds up to 22 characters, and has at most 63.
[[ "$name" =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
  mcm_refuse "--name=$name must be lower case letters, digits and dashes, begin with a letter and have at most 40"
for option in slices hosts chips; do
  case "${!option}" in '' | *[!0-9]* | 0*) mcm_refuse "--$option=${!option} must be a number from 1 on" ;; esac
done
if [ "$kind" = gpu ] && { [ -n "$topology" ] || [ "$slices" != 1 ]; }; then
  mcm_refuse "--topology and --slices are for tpu; nodes with GPUs are counted by --hosts"
fi
mcm_require_run "$@"
if [ -z "${MCM_DRY_RUN:-}" ] && ! command -v kubectl >/dev/null; then
  mcm_refuse "kubectl is not installed; see https://kubernetes.io/docs/tasks/tools"
fi

# The arguments as a list of YAML, which JSON is too.
list=''
for argument in "$@"; do
  argument="${argument//\\/\\\\}"
  list="$list, \"${argument//\"/\\\"}\""
done

manifest=$(cat "launch/gke/$kind.yaml")
[ -n "$spot" ] || manifest=$(grep -v 'gke-spot: "true"' <<<"$manifest")
for pair in "NAME=$name" "IMAGE=$image" "CLAIM=$claim" "ACCELERATOR=$accelerator" "TOPOLOGY=$topology" \
  "SLICES=$slices" "HOSTS=$hosts" "CHIPS=$chips" "ARGUMENTS=[${list#, }]"; do
  value="${pair#*=}"
  manifest=${manifest//"\${${pair%%=*}}"/"$value"}
done
if [ -n "${MCM_DRY_RUN:-}" ]; then
  # As comments, so that the whole output is a manifest.
  printf '# + %s\n' "kubectl apply --filename=- <<this"
  printf '%s\n' "$manifest"
else
  kubectl apply --filename=- <<<"$manifest"
fi
