#!/usr/bin/env bash
# Trains on a Cloud TPU slice with any number of hosts: requests the slice (or uses an existing one with that name),
# installs this checkout on all hosts and trains. After a preemption it repeats this, until the run is finished.
#
#   bash launch/tpu_pod.sh --name=mcm --zone=us-west4-a --type=v5litepod-16 --spot \
#       -- --config=openmoji:teacher --config.data.data_dir=gs://bucket/data \
#       --workdir=gs://bucket/runs/teacher
#
#   --name=NAME --zone=ZONE   name and zone of the slice and of its queued resource
#   --type=TYPE               accelerator type, e.g. v5litepod-16, v5p-32, v6e-64
#   --version=VERSION         runtime version; default: depends on the type
#   --project=PROJECT         project; default: gcloud's
#   --spot                    requests spot capacity: cheaper, but may be preempted at any time
#   --setup=COMMAND           runs on all hosts before each attempt; mounts storage other than buckets, such as NFS:
#                             'mountpoint -q /mnt/mcm || sudo mount --mkdir 10.0.0.2:/mcm /mnt/mcm'
#   --attempts=N              gives up after N failures in a row, not counting preemptions; default 3
#   --delete                  deletes the slice when the run is finished
#   --dry-run                 only prints the commands
#
# Arguments after -- go to `python -m mcm_jax.train`. --workdir must be in a bucket or in a directory that all hosts
# share. Ctrl-C saves a checkpoint and leaves the slice running; the same command continues. If only the connection to
# the hosts is lost, training continues there, and the same command reconnects to it.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh

name='' zone='' type='' version='' project='' setup='' attempts=3 spot='' delete=''
while [ $# -gt 0 ]; do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --version=*) version="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --setup=*) setup="${1#*=}" ;;
    --attempts=*) attempts="${1#*=}" ;;
    --spot) spot=yes ;;
    --delete) delete=yes ;;
    --dry-run) export MCM_DRY_RUN=1 ;;
    --) shift && break ;;
    *) mcm_refuse "$1 is not an option; see the head of launch/tpu_pod.sh (arguments of mcm_jax.train follow --)" ;;
  esac
  shift
done
[ -n "$name" ] || mcm_refuse "--name=NAME is missing: the name of the slice"
[ -n "$zone" ] || mcm_refuse "--zone=ZONE is missing, e.g. --zone=us-west4-a"
[ -n "$type" ] || mcm_refuse "--type=TYPE is missing, e.g. --type=v5litepod-16"
case "$attempts" in '' | *[!0-9]* | 0) mcm_refuse "--attempts=$attempts must be a number of at least 1" ;; esac
mcm_require_run "$@"
if [ -z "$version" ]; then
  case "$type" in
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    v[234]-*) version=tpu-ubuntu2204-base ;;
    *) mcm_refuse "--type=$type is unknown; set its runtime version with --version=VERSION" ;;
  esac
fi
if [ -z "${MCM_DRY_RUN:-}" ] && ! command -v gcloud >/dev/null; then
  mcm_refuse "gcloud is not installed; see https://cloud.google.com/sdk"
fi
place=(--zone="$zone" ${project:+"--project=$project"} --quiet)
poll_seconds="${MCM_POLL_SECONDS:-30}"
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT

tpus() {
  mcm_run gcloud compute tpus "$@" "${place[@]}"
}

# on_hosts 0|all COMMAND: runs the command on the first host, or on all hosts
on_hosts() {
  tpus tpu-vm ssh "$name" --worker="$1" --command="$2"
}

# state_of tpu-vm|queued-resources: prints the state of the slice or its request; empty if it does not exist
state_of() {
  local field=state
  [ "$1" = tpu-vm ] || field=state.state
  if gcloud compute tpus "$1" describe "$name" --format="value($field)" "${place[@]}" 2>"$temporary/error"; then
    return
  fi
  grep -q NOT_FOUND "$temporary/error" || { cat "$temporary/error" >&2 && return 1; }
}

# Waits until the slice is ready, however long that takes.
require_slice() {
  local node queued said=''
  while :; do
    node=$(state_of tpu-vm)
    [ "$node" != READY ] || return 0
    queued=$(state_of queued-resources)
    if [ "$said" != "$node/$queued" ]; then
      said="$node/$queued"
      echo "slice $name: ${node:-not there}, its request: ${queued:-none}"
    fi
    case "$queued/$node" in
      /) request_slice ;;
      /PREEMPTED | /TERMINATED) tpus tpu-vm delete "$name" ;;
      # A preempted slice keeps its name and its request, but the request is not granted again.
      SUSPENDED/* | FAILED/* | ACTIVE/PREEMPTED | ACTIVE/TERMINATED)
        tpus queued-resources delete "$name" --force
        ;;
      *) sleep "$poll_seconds" ;;
    esac
  done
}

request_slice() {
  tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
    --runtime-version="$version" ${spot:+--spot}
}

install_checkout() {
  local archive="$temporary/mcm_jax.tar.gz"
  mcm_run tar --anchored --exclude=./.git --exclude='./.venv*' --exclude='./.*_cache' --exclude=./.hypothesis \
    --exclude=./runs --exclude=./data -czf "$archive" . || return 1
  tpus tpu-vm scp "$archive" "$name:mcm_jax.tar.gz" --worker=all || return 1
  on_hosts all "${setup:+$setup && }mkdir -p mcm_jax && tar -xzf mcm_jax.tar.gz -C mcm_jax && bash mcm_jax/launch/tpu_host.sh install"
}

# Runs in the background, so that Ctrl-C stops the training on the hosts, not the connection to them.
train() {
  local code=0
  on_hosts all "bash mcm_jax/launch/tpu_host.sh train $arguments" &
  training=$!
  wait "$training" || code=$?
  if [ -n "$stopping" ]; then
    wait "$training" || true
    echo "stopped and saved: the same command continues; the slice $name is still there" >&2
    exit 130
  fi
  return "$code"
}

stop() {
  stopping=yes
  echo "stopping" >&2
  on_hosts all "bash mcm_jax/launch/tpu_host.sh stop" || true
}

arguments=$(printf '%q ' "$@")
arguments="${arguments% }"
stopping='' failures=0
while :; do
  if [ -n "${MCM_DRY_RUN:-}" ]; then request_slice; else require_slice; fi
  if install_checkout; then
    trap stop INT TERM
    if train; then break; fi
    trap - INT TERM
  fi
  # Reads the exit code from the first host, because gcloud only reports that a command failed somewhere.
  code=$(on_hosts 0 "cat .mcm_train.code" 2>/dev/null) || code=unknown
  if [ "$(state_of tpu-vm)" != READY ]; then
    echo "slice $name was preempted; the run continues on another"
    failures=0
  elif [ "$code" = 2 ]; then
    echo "error: mcm_jax.train reports bad input, see above" >&2
    exit 2
  else
    failures=$((failures + 1))
    if [ "$failures" -ge "$attempts" ]; then
      echo "error: training failed $failures times in a row without a preemption; see above" >&2
      exit 1
    fi
    echo "training failed (exit code $code); the run continues from its last checkpoint"
    sleep "$poll_seconds"
  fi
done
trap - INT TERM
if [ -n "$delete" ]; then tpus queued-resources delete "$name" --force; fi
