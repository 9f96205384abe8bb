#!/usr/bin/env bash
# Trains on a Cloud TPU slice with any number of hosts: requests the slice (or uses an existing one with that name),
# installs this checkout on all hosts and trains. After a preemption it repeats this, until the run is finished.
#
#   bash launch/tpu_pod.sh --name=mcm --zone=us-west4-a --type=v5litepod-16 --spot \
#       -- --config=openmoji:teacher --config.data.data_dir=gs://bucket/data \
#       --workdir=gs://bucket/runs/teacher
#   bash launch/tpu_pod.sh --name=mcm --zone=us-west4-a --type=v5litepod-16 --program=evaluate --delete \
#       -- --workdir=gs://bucket/runs/teacher --cache_dir=gs://bucket/references
#
#   --name=NAME --zone=ZONE   name and zone of the slice and of its queued resource
#   --type=TYPE               accelerator type, e.g. v5litepod-16, v5p-32, v6e-64
#   --version=VERSION         runtime version; default: depends on the type
#   --project=PROJECT         project; default: gcloud's
#   --program=PROGRAM         train (default), evaluate, sample, or prepare, which runs on the first host only
#   --spot                    requests spot capacity: cheaper, but may be preempted at any time
#   --flex-start=DURATION     requests capacity for that long, e.g. 24h, at most seven days (a preview: gcloud alpha)
#   --reserved                takes the capacity from the project's reservation
#   --nfs=ADDRESS:/SHARE      mounts this NFS share, such as Filestore's, at /mnt/mcm on all hosts
#   --setup=COMMAND           runs on all hosts before each attempt, for instance to mount another disk
#   --local-workdir           allows paths on the boot disk, which are lost with the slice
#   --internal-ips            hosts without public addresses: connects from a machine in the same network
#   --iap                     connects through the Identity-Aware Proxy, to a slice that this launcher has requested
#   --network=NAME --subnetwork=NAME --service-account=EMAIL --labels=KEY=VALUE,... --data-disk=source=DISK,...
#                             passed on to gcloud
#   --attempts=N              gives up after N failures in a row, not counting preemptions; default 3
#   --delete                  deletes the slice when the run is finished
#   --dry-run                 only prints the commands
#
# Arguments after -- go to the program. What it writes must be in a bucket or in a directory that all hosts share.
# Ctrl-C saves a checkpoint and leaves the slice running; the same command continues. If only the connection to the
# hosts is lost, the program continues there, and the same command reconnects to it.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh

name='' zone='' type='' version='' project='' program=train setup='' nfs='' attempts=3 delete='' local_workdir=''
# What goes to gcloud with the request, the options among them that choose the kind of capacity, and the route to hosts.
request=() tiers=() alpha='' internal='' iap='' data_disk=''
while [ $# -gt 0 ]; do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --version=*) version="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --setup=*) setup="${1#*=}" ;;
    --attempts=*) attempts="${1#*=}" ;;
    --program=*) program="${1#*=}" ;;
    --nfs=*) nfs="${1#*=}" ;;
    --spot | --reserved) request+=("$1") tiers+=("$1") ;;
    --flex-start=*)
      [[ "$1" =~ ^--flex-start=[1-9][0-9]*[mhd]$ ]] || mcm_refuse "$1 must be a duration, e.g. --flex-start=24h"
      # Only this track of gcloud has the two flags.
      alpha=alpha
      request+=(--provisioning-model=flex-start "--max-run-duration=${1#*=}") tiers+=(--flex-start)
      ;;
    --internal-ips) request+=("$1") internal=yes ;;
    --iap) iap=yes ;;
    --data-disk=*) request+=("$1") data_disk=yes ;;
    --network=* | --subnetwork=* | --service-account=* | --labels=*) request+=("$1") ;;
    --local-workdir) local_workdir=yes ;;
    --delete) delete=yes ;;
    --dry-run) export MCM_DRY_RUN=1 ;;
    --) shift && break ;;
    *) mcm_refuse "$1 is not an option; see the head of launch/tpu_pod.sh (arguments of the program follow --)" ;;
  esac
  shift
done
[ -n "$name" ] || mcm_refuse "--name=NAME is missing: the name of the slice"
[ -n "$zone" ] || mcm_refuse "--zone=ZONE is missing, e.g. --zone=us-west4-a"
[ -n "$type" ] || mcm_refuse "--type=TYPE is missing, e.g. --type=v5litepod-16"
case "$attempts" in '' | *[!0-9]* | 0) mcm_refuse "--attempts=$attempts must be a number of at least 1" ;; esac
[ "${#tiers[@]}" -le 1 ] || mcm_refuse "${tiers[*]}: choose one of them"
[ -z "$nfs" ] || [[ "$nfs" =~ ^[^:]+:/.+$ ]] || mcm_refuse "--nfs=$nfs must be ADDRESS:/SHARE, e.g. --nfs=10.0.0.2:/mcm"
mcm_require_run "$program" "$@"
# A slice takes its boot disk with it when it is preempted or deleted.
if [ -n "$local_workdir" ]; then
  [ -z "$delete" ] || mcm_refuse "--delete would delete what --local-workdir keeps on the slice; remove one of them"
else
  shared=() # on NFS, or on whatever the options mount: the hosts check it
  while read -r path; do
    [ -n "$path" ] || continue
    case "${path#*=}" in
      /mnt/mcm/?*) mounts="$nfs$setup$data_disk" ;;
      /*) mounts="$setup$data_disk" ;;
      *) mounts='' ;;
    esac
    [ -n "$mounts" ] || mcm_refuse "$path would be on the boot disk, which is lost with the slice;" \
      "use gs://BUCKET/PATH, or --nfs=ADDRESS:/SHARE and a path below /mnt/mcm, or keep it there with --local-workdir"
    shared+=("${path#*=}")
  done <<<"$(mcm_local_paths "$program" "$@")"
fi
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

# `tpu-vm ssh` knows public and internal addresses; `queued-resources ssh` also knows the proxy.
through=tpu-vm route=()
if [ -n "$iap" ]; then
  through=queued-resources route=(--node=0 --tunnel-through-iap)
elif [ -n "$internal" ]; then
  route=(--internal-ip)
fi

# on_hosts 0|all COMMAND: runs the command on the first host, or on all hosts
on_hosts() {
  tpus "$through" ssh "$name" --worker="$1" --command="$2" ${route[@]+"${route[@]}"}
}

# Runs the command. If it fails, $failure is what it said, in one line.
try() {
  failure=''
  if "$@" 2>"$temporary/error"; then
    cat "$temporary/error" >&2
    return
  fi
  failure=$(<"$temporary/error")
  failure="${failure//$'\n'/ }"
  return 1
}

# state_of tpu-vm|queued-resources: prints the state of the slice or its request; empty if it does not exist. A run takes
# days, so some of the questions meet a bad moment of the network.
state_of() {
  local field=state left pause="$poll_seconds"
  [ "$1" = tpu-vm ] || field=state.state
  for left in 5 4 3 2 1 0; do
    if try tpus "$1" describe "$name" --format="value($field)" || [[ "$failure" = *NOT_FOUND* ]]; then return; fi
    echo "slice $name: $failure" >&2
    [ "$left" -gt 0 ] || break
    sleep "$pause"
    pause=$(awk "BEGIN { print 2 * $pause }")
  done
  echo "error: gcloud compute tpus $1 describe $name failed 6 times in a row, see above" >&2
  return 1
}

# remove tpu-vm|queued-resources: deletes the slice, or its request together with the slice, unless it is already gone
remove() {
  local force=''
  [ "$1" = tpu-vm ] || force=--force
  try tpus "$1" delete "$name" ${force:+"$force"} || [[ "$failure" = *NOT_FOUND* ]]
}

# Waits until the slice is ready, however long that takes. A request that fails is made again after a pause: what Google
# refuses now, for want of quota or of a permission, it refuses a second later.
require_slice() {
  local node queued why said='' failed=0 gone=0 pause=60
  while :; do
    node=$(state_of tpu-vm)
    [ "$node" != READY ] || return 0
    queued=$(state_of queued-resources)
    if [ "$said" != "$node/$queued" ]; then
      said="$node/$queued" gone=0
      echo "slice $name: ${node:-not there}, its request: ${queued:-none}"
    fi
    why=''
    case "$queued/$node" in
      /) try request_slice || why="the request failed: $failure" ;;
      /PREEMPTED | /TERMINATED) remove tpu-vm || why="it could not be deleted: $failure" ;;
      # A preempted slice keeps its name and its request, but the request is not granted again.
      SUSPENDED/* | ACTIVE/PREEMPTED | ACTIVE/TERMINATED)
        remove queued-resources || why="it could not be deleted: $failure"
        ;;
      FAILED/*)
        why=$(tpus queued-resources describe "$name" --format="value(state.failedData.error.message)" 2>&1) || true
        why="the request failed${why:+: $why}"
        ;;
      # Not at the first look: the two questions are not asked at the same moment.
      ACTIVE/)
        gone=$((gone + 1))
        if [ "$gone" -ge 3 ]; then why="the request is ACTIVE, but its slice is gone"; else sleep "$poll_seconds"; fi
        ;;
      *) sleep "$poll_seconds" ;;
    esac
    [ -n "$why" ] || continue
    failed=$((failed + 1))
    if [ "$failed" -ge 8 ]; then
      echo "error: slice $name: $failed requests in a row failed; the last time, $why;" \
        "ask for quota, or choose another --zone or --type" >&2
      exit 1
    fi
    echo "slice $name: $why; asking again in $pause seconds" >&2
    remove queued-resources || echo "slice $name: $failure" >&2
    sleep "$pause"
    pause=$((pause < 900 ? 2 * pause : 1800))
  done
}

request_slice() {
  # shellcheck disable=SC2086 # No word at all without flex-start.
  mcm_run gcloud $alpha compute tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
    --runtime-version="$version" ${request[@]+"${request[@]}"} "${place[@]}"
}

# At the first attempt only, so that all attempts run the same code.
pack_checkout() {
  if [ -f "$1" ]; then return; fi
  mcm_run tar --anchored --exclude=./.git --exclude='./.venv*' --exclude='./.*_cache' --exclude=./.hypothesis \
    --exclude=./runs --exclude=./data -czf "$1" . || { rm -f "$1" && return 1; }
}

install_checkout() {
  local archive="$temporary/mcm_jax.tar.gz" host="bash mcm_jax/launch/tpu_host.sh" steps
  pack_checkout "$archive" || return 1
  tpus "$through" scp "$archive" "$name:mcm_jax.tar.gz" --worker=all ${route[@]+"${route[@]}"} || return 1
  steps="${setup:+$setup && }mkdir -p mcm_jax && tar -xzf mcm_jax.tar.gz -C mcm_jax"
  [ -z "$nfs" ] || steps="$steps && $host mount $(printf '%q' "$nfs")"
  [ -z "${shared[*]-}" ] || steps="$steps && $host storage$(printf ' %q' "${shared[@]}")"
  on_hosts all "$steps && $host install"
}

# Runs in the background, so that Ctrl-C stops the program on the hosts, not the connection to them.
run_program() {
  local code=0 hosts=all
  [ "$program" != prepare ] || hosts=0
  on_hosts "$hosts" "bash mcm_jax/launch/tpu_host.sh $program $arguments" &
  running=$!
  wait "$running" || code=$?
  if [ -n "$stopping" ]; then
    wait "$running" || true
    echo "stopped: the same command continues; the slice $name is still there" >&2
    exit 130
  fi
  return "$code"
}

stop() {
  stopping=yes
  echo "stopping" >&2
  on_hosts all "bash mcm_jax/launch/tpu_host.sh stop" || true
}

# Removes the hosts' exit codes before the program is started, or those of an earlier one would be taken for its own. They
# stay where a lost connection is made again: hosts do not start again what has ended meanwhile.
forget_codes() {
  [ -n "$stale" ] || return 0
  on_hosts all "rm -f .mcm_run.code" || return 1
  stale=''
}

# Prints the exit code of the program on each host, "none" where it has not ended: gcloud only reports that a command
# failed somewhere.
exit_codes() {
  # shellcheck disable=SC2016 # The hosts expand it.
  on_hosts all 'echo "exit_code=$(cat .mcm_run.code 2>/dev/null || echo none)"' 2>/dev/null |
    sed -n 's/^.*exit_code=//p' | paste -sd ' ' -
}

arguments=$(printf '%q ' "$@")
arguments="${arguments% }"
# stale: whether the hosts may hold exit codes from before this start of the program.
stopping='' failures=0 stale=yes
while :; do
  if [ -n "${MCM_DRY_RUN:-}" ]; then request_slice; else require_slice; fi
  if forget_codes && install_checkout; then
    trap stop INT TERM
    if run_program; then break; fi
    trap - INT TERM
  fi
  codes=''
  [ -n "$stale" ] || codes=$(exit_codes) || true
  node=$(state_of tpu-vm)
  if [ "$node" != READY ]; then
    echo "slice $name was preempted; the run continues on another"
    failures=0 stale=yes
    continue
  elif [[ " $codes " = *" 2 "* ]]; then
    echo "error: mcm_jax.$program reports bad input, see above" >&2
    exit 2
  fi
  failures=$((failures + 1))
  if [ "$failures" -ge "$attempts" ]; then
    echo "error: mcm_jax.$program failed $failures times in a row without a preemption; see above" >&2
    exit 1
  fi
  if [[ "$codes" = *[1-9]* ]]; then
    echo "mcm_jax.$program has failed (exit codes of the hosts: $codes); it is started again"
    stale=yes
  else
    echo "the hosts were not set up or reached (exit codes of mcm_jax.$program: ${codes:-unknown}); trying again"
  fi
  sleep "$poll_seconds"
done
trap - INT TERM
if [ -n "$delete" ] && ! remove queued-resources; then
  echo "error: the run is finished, but slice $name could not be deleted and may still cost money: $failure" >&2
  exit 1
fi
