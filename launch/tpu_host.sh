#!/usr/bin/env bash
# Runs on every host of a slice, called by tpu_pod.sh. A program continues if the connection is lost: its output goes to
# ~/mcm_run.log and its exit code to ~/.mcm_run.code.
#
#   bash launch/tpu_host.sh mount ADDRESS:/SHARE    mounts an NFS share at /mnt/mcm, and installs what that needs
#   bash launch/tpu_host.sh storage PATH...         refuses paths on the boot disk
#   bash launch/tpu_host.sh install                 installs this checkout at pinned versions
#   bash launch/tpu_host.sh PROGRAM ARGUMENT...     starts train, evaluate, sample or prepare, unless it is running
#                                                   already or there is an exit code, and follows it to its end
#   bash launch/tpu_host.sh stop                    ends it; training saves a checkpoint first
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
export MCM_ACCELERATOR=tpu MCM_VENV="${MCM_VENV:-$HOME/mcm_venv}"
state="$HOME/.mcm_run" log="$HOME/mcm_run.log" share=/mnt/mcm

# Bad input for tpu_pod.sh, which learns of the exit code from this file: gcloud only reports that a command failed.
refuse() {
  echo 2 >"$state.code"
  mcm_refuse "$@"
}

mount_share() {
  if ! mountpoint -q "$share"; then
    # The images of TPU VMs do not contain it. Their first start holds dpkg's lock for some minutes.
    if ! command -v mount.nfs >/dev/null; then
      sudo apt-get -o DPkg::Lock::Timeout=600 -qq update
      sudo apt-get -o DPkg::Lock::Timeout=600 -qq install --yes nfs-common
    fi
    # In two steps: their util-linux, 2.37, has no `mount --mkdir`.
    sudo mkdir -p "$share"
    sudo mount -t nfs "$1" "$share"
  fi
  [ "$(findmnt -no SOURCE "$share")" = "$1" ] ||
    refuse "$share holds $(findmnt -no SOURCE "$share"), not $1; unmount it, or delete the slice"
  [ -w "$share" ] ||
    refuse "$(id -un) may not write to $1; give everybody the right on one host, once: sudo chmod a+rwx $share"
}

require_storage() {
  local path parent
  for path in "$@"; do
    parent="$path"
    until [ -e "$parent" ]; do parent=$(dirname "$parent"); done
    [ "$(stat -c %d "$parent")" != "$(stat -c %d /)" ] ||
      refuse "$path is on the boot disk, which is lost with the slice; mount a disk there with --setup, or use --nfs"
  done
}

# The images of TPU VMs contain an older Python. An existing environment needs no other.
require_python() {
  if [ -x "$MCM_VENV/bin/pip" ] || mcm_supports python3; then return; fi
  local uv="$HOME/.local/bin/uv"
  [ -x "$uv" ] || python3 -m pip install --quiet --user uv
  "$uv" python install --quiet 3.12
  PYTHON=$("$uv" python find 3.12)
  export PYTHON
}

is_running() {
  [ -f "$state.pid" ] && grep -qs "mcm_jax\." "/proc/$(cat "$state.pid")/cmdline"
}

stop() {
  if ! is_running; then return 0; fi
  kill -TERM "$(cat "$state.pid")"
  for _ in $(seq 300); do
    is_running || return 0
    sleep 1
  done
  kill -KILL "$(cat "$state.pid")"
}

# Runs under setsid, and so outlives the connection.
run() {
  local code=0 program="$1"
  shift
  python -m "mcm_jax.$program" "$@" &
  echo $! >"$state.pid"
  wait $! || code=$?
  echo "$code" >"$state.code"
}

# start PROGRAM ARGUMENT...
start() {
  rm -f "$state.pid" "$state.code"
  printf '%q ' "$@" >"$state.command"
  : >"$log"
  setsid bash launch/tpu_host.sh run "$@" </dev/null >>"$log" 2>&1 &
  until [ -f "$state.pid" ]; do sleep 0.1; done
}

# follow PROGRAM ARGUMENT...: tpu_pod.sh removes the exit code when the program is to start anew. If it is there, the
# program has ended while there was no connection.
follow() {
  if [ "$(cat "$state.command" 2>/dev/null)" != "$(printf '%q ' "$@")" ]; then
    stop || true
    start "$@"
  elif ! is_running && [ ! -f "$state.code" ]; then
    start "$@"
  fi
  tail -n +1 -f --pid="$(cat "$state.pid")" "$log"
  until [ -f "$state.code" ]; do sleep 0.1; done
  return "$(cat "$state.code")"
}

action="${1:-}"
[ $# -eq 0 ] || shift
case "$action" in
  mount) mount_share "$1" ;;
  storage) require_storage "$@" ;;
  install)
    require_python
    mcm_environment
    ;;
  run) run "$@" ;;
  stop) stop ;;
  train | evaluate | sample | prepare)
    # It runs on one host, whose TPUs would wait for those of the others.
    [ "$action" != prepare ] || export JAX_PLATFORMS=cpu
    require_python
    mcm_environment
    follow "$action" "$@"
    ;;
  *) mcm_refuse "use launch/tpu_host.sh mount, storage, install, train, evaluate, sample, prepare or stop" ;;
esac
