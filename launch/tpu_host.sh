#!/usr/bin/env bash
# Runs on every host of a slice, called by tpu_pod.sh. Training continues if the connection is lost: its output goes to
# ~/mcm_train.log and its exit code to ~/.mcm_train.code.
#
#   bash launch/tpu_host.sh install             installs this checkout at pinned versions
#   bash launch/tpu_host.sh train ARGUMENT...   starts training unless it is already running, and follows it to its end
#   bash launch/tpu_host.sh stop                makes it save a checkpoint and exit
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
export MCM_ACCELERATOR=tpu MCM_VENV="${MCM_VENV:-$HOME/mcm_venv}"
state="$HOME/.mcm_train" log="$HOME/mcm_train.log"

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
  [ -f "$state.pid" ] && grep -qs mcm_jax.train "/proc/$(cat "$state.pid")/cmdline"
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

# Runs in its own session, which outlives the connection.
run() {
  local code=0
  python -m mcm_jax.train "$@" &
  echo $! >"$state.pid"
  wait $! || code=$?
  echo "$code" >"$state.code"
}

train() {
  local command
  command=$(printf '%q ' "$@")
  if is_running && [ "$(cat "$state.command")" != "$command" ]; then stop; fi
  if ! is_running; then
    rm -f "$state.pid" "$state.code"
    printf '%s\n' "$command" >"$state.command"
    : >"$log"
    setsid bash launch/tpu_host.sh run "$@" </dev/null >>"$log" 2>&1 &
    until [ -f "$state.pid" ]; do sleep 0.1; done
  fi
  tail -n +1 -f --pid="$(cat "$state.pid")" "$log"
  until [ -f "$state.code" ]; do sleep 0.1; done
  return "$(cat "$state.code")"
}

action="${1:-}"
[ $# -eq 0 ] || shift
case "$action" in
  install)
    require_python
    mcm_environment
    ;;
  run) run "$@" ;;
  stop) stop ;;
  train)
    require_python
    mcm_environment
    train "$@"
    ;;
  *) mcm_refuse "use launch/tpu_host.sh install, train ARGUMENT... or stop" ;;
esac
