#!/usr/bin/env bash
# Trains on GKE as a JobSet, on one or more TPU slices or on nodes with GPUs. The cluster needs the JobSet operator
# (https://jobset.sigs.k8s.io). After a preemption or failure all pods restart from the last checkpoint.
#
#   bash launch/gke/train.sh tpu --name=cd4 --image=REGISTRY/mcm_jax:tpu --slices=2 \
#       --accelerator=tpu-v5-lite-podslice --topology=4x8 --hosts=8 --chips=4 \
#       -- --config=openmoji:teacher --config.data.data_dir=gs://bucket/data --workdir=gs://bucket/runs/teacher
#   bash launch/gke/train.sh gpu --name=cd4 --image=REGISTRY/mcm_jax:gpu --claim=mcm \
#       --accelerator=nvidia-h100-80gb --hosts=4 --chips=8 -- ...
#
#   --name=NAME             name of the JobSet: lower case letters, digits and dashes
#   --image=IMAGE           image that launch/docker.sh --push has pushed
#   --program=PROGRAM       train (default), evaluate, sample, or prepare, which needs --hosts=1
#   --claim=CLAIM           a PersistentVolumeClaim that many nodes can write to (Filestore), mounted at /mnt/mcm; not
#                           needed with gs:// paths
#   --accelerator=NAME      the nodes' label cloud.google.com/gke-tpu-accelerator, or gke-accelerator
#   --topology=TOPOLOGY     tpu: topology of a slice
#   --slices=N              tpu: number of slices; default 1
#   --hosts=N --chips=N     nodes in each slice (gpu: in total), and TPU chips or GPUs on each node
#   --cpu=N --memory=SIZE   what each pod requests of its node beside them, e.g. --cpu=24 --memory=80Gi
#   --service-account=NAME  Kubernetes service account of the pods, with the right to use the bucket
#   --queue=NAME            Kueue's LocalQueue
#   --spot                  runs on spot nodes
#   --dry-run               prints the manifest instead of applying it
#
# Arguments after -- go to the program. `kubectl delete jobset NAME` saves a checkpoint and ends the run; the same
# command continues it.
set -euo pipefail
cd "$(dirname "$0")/../.."
. launch/environment.sh

kind="${1:-}"
case "$kind" in
  tpu | gpu) shift ;;
  *) mcm_refuse "specify tpu or gpu first: bash launch/gke/train.sh tpu --name=..." ;;
esac
name='' image='' claim='' accelerator='' topology='' slices=1 hosts='' chips='' spot='' program=train
cpu='' memory='' service_account='' queue=''
# shellcheck disable=SC2034 # Below, they are read as ${!option}.
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
    --program=*) program="${1#*=}" ;;
    --cpu=*) cpu="${1#*=}" ;;
    --memory=*) memory="${1#*=}" ;;
    --service-account=*) service_account="${1#*=}" ;;
    --queue=*) queue="${1#*=}" ;;
    --spot) spot=yes ;;
    --dry-run) export MCM_DRY_RUN=1 ;;
    --) shift && break ;;
    *) mcm_refuse "$1 is not an option; see the head of launch/gke/train.sh (arguments of the program follow --)" ;;
  esac
  shift
done
needed=(name image accelerator hosts chips)
[ "$kind" = gpu ] || needed+=(topology)
for option in "${needed[@]}"; do
  [ -n "${!option}" ] || mcm_refuse "--$option=... is missing; see the head of launch/gke/train.sh"
done
for option in "${needed[@]}" claim cpu memory service_account queue; do
  case "${!option}" in
    *[!A-Za-z0-9._:/@-]*) mcm_refuse "--${option/_/-}=${!option} contains characters that are not allowed" ;;
  esac
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
mcm_require_run "$program" "$@"
if [ "$program" = prepare ] && [ "$((hosts * slices))" != 1 ]; then
  mcm_refuse "--program=prepare runs in one pod: use --hosts=1 (and --slices=1)"
fi
# Whatever else a container writes is lost with it.
while read -r path; do
  case "${claim:+claim}${path#*=}" in '' | claim | claim/mnt/mcm/?*) continue ;; esac
  mcm_refuse "$path would be lost with the pod; use gs://BUCKET/PATH, or --claim=CLAIM and a path below /mnt/mcm"
done <<<"$(mcm_local_paths "$program" "$@")"
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
# A line that an option brings ends with the option's name.
for option in claim cpu memory service_account queue spot; do
  [ -n "${!option}" ] || manifest=$(grep -v " # --${option/_/-}\$" <<<"$manifest")
done
for pair in "NAME=$name" "IMAGE=$image" "CLAIM=$claim" "ACCELERATOR=$accelerator" "TOPOLOGY=$topology" \
  "SLICES=$slices" "HOSTS=$hosts" "CHIPS=$chips" "PROGRAM=$program" "CPU=$cpu" "MEMORY=$memory" \
  "SERVICE_ACCOUNT=$service_account" "QUEUE=$queue" "ARGUMENTS=[${list#, }]"; do
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
