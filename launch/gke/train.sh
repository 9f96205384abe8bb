#!/usr/bin/env bash
# Trains on GKE as a JobSet, on one or more TPU slices or on nodes with GPUs. The cluster needs the JobSet operator
# (https://jobset.sigs.k8s.io). After a preemption or failure all pods restart from the last checkpoint.
#
#   bash launch/gke/train.sh tpu --name=cd4 --image=REGISTRY/mcm_jax:tpu --claim=mcm --slices=2 \
#       --accelerator=tpu-v5-lite-podslice --topology=4x8 --hosts=8 --chips=4 \
#       -- --config=openmoji:teacher --config.data.data_dir=/mnt/mcm/data \
#       --workdir=/mnt/mcm/runs/teacher
#   bash launch/gke/train.sh gpu --name=cd4 --image=REGISTRY/mcm_jax:gpu --claim=mcm \
#       --accelerator=nvidia-h100-80gb --hosts=4 --chips=8 -- ...
#
#   --name=NAME             name of the JobSet: lower case letters, digits and dashes
#   --image=IMAGE           image that launch/docker.sh --push has pushed
#   --claim=CLAIM           a PersistentVolumeClaim that many nodes can write to (Filestore), mounted at /mnt/mcm
#   --accelerator=NAME      the nodes' label cloud.google.com/gke-tpu-accelerator, or gke-accelerator
#   --topology=TOPOLOGY     tpu: topology of a slice
#   --slices=N              tpu: number of slices; default 1
#   --hosts=N --chips=N     nodes in each slice (gpu: in total), and TPU chips or GPUs on each node
#   --spot                  runs on spot nodes
#   --dry-run               prints the manifest instead of applying it
#
# Arguments after -- go to `python -m mcm_jax.train`. `kubectl delete jobset NAME` saves a checkpoint and ends the run;
# the same command continues it.
set -euo pipefail
cd "$(dirname "$0")/../.."
. launch/environment.sh

kind="${1:-}"
case "$kind" in
  tpu | gpu) shift ;;
  *) mcm_refuse "specify tpu or gpu first: bash launch/gke/train.sh tpu --name=..." ;;
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
  case "${!option}" in *[!A-Za-z0-9._:/@-]*) mcm_refuse "--$option=${!option} contains characters that are not allowed" ;; esac
done
# Kubernetes appends up to 22 characters to make a pod's name, which may have at most 63.
[[ "$name" =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
  mcm_refuse "--name=$name must be lower case letters, digits and dashes, begin with a letter and have at most 40 characters"
for option in slices hosts chips; do
  case "${!option}" in '' | *[!0-9]* | 0*) mcm_refuse "--$option=${!option} must be a number of at least 1" ;; esac
done
if [ "$kind" = gpu ] && { [ -n "$topology" ] || [ "$slices" != 1 ]; }; then
  mcm_refuse "--topology and --slices are for tpu; for gpu, --hosts is the number of nodes"
fi
mcm_require_run "$@"
if [ -z "${MCM_DRY_RUN:-}" ] && ! command -v kubectl >/dev/null; then
  mcm_refuse "kubectl is not installed; see https://kubernetes.io/docs/tasks/tools"
fi

# The arguments as a JSON list, which is also YAML.
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
