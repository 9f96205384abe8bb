# shellcheck shell=bash
# Sourced by the launchers: makes .venv in the checkout, or reuses it, and puts it on PATH.
#
#   mcm_environment EXTRA...    installs mcm_jax with these extras of setup.cfg, at pinned versions
#   mcm_run COMMAND...          runs it, or prints it in a dry run
#   mcm_refuse MESSAGE          ends the launcher: the user's input is at fault
#   mcm_require_run ARGUMENT... refuses what `python -m mcm_jax.train` could not start with
#
# PYTHON=python3.12 chooses the interpreter (3.11 or newer), MCM_VENV=DIR another place for the environment,
# MCM_ACCELERATOR=gpu or tpu the variant of JAX; MCM_DRY_RUN=1 prints what would be run.

mcm_run() {
  if [ -n "${MCM_DRY_RUN:-}" ]; then
    printf '+ %s\n' "$*"
  else
    "$@"
  fi
}

mcm_refuse() {
  echo "error: $*" >&2
  exit 2
}

mcm_require_run() {
  local flag argument
  for flag in --config --workdir; do
    for argument in "$@"; do
      case "$argument" in "$flag="?*) continue 2 ;; esac
    done
    mcm_refuse "$flag=... is missing among the arguments of mcm_jax.train, which stand after --"
  done
}

# shellcheck disable=SC2120 # Without extras it has no arguments.
mcm_environment() {
  local extras="$*" python="${PYTHON:-python3}" venv="${MCM_VENV:-$PWD/.venv}" stamp wanted
  case "${MCM_ACCELERATOR:-cpu}" in
    cpu) export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" ;;
    gpu | tpu) extras="$extras $MCM_ACCELERATOR" ;;
    *)
      echo "error: MCM_ACCELERATOR=$MCM_ACCELERATOR must be cpu, gpu or tpu" >&2
      return 2
      ;;
  esac
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: $python is not Python 3.11 or newer; name one with PYTHON=/path/to/python3.12" >&2
    return 2
  fi
  # shellcheck disable=SC2086 # Words, one a line.
  extras=$(printf '%s\n' $extras | sort -u | paste -sd, -)
  stamp="$venv/installed-${extras:-base}"
  wanted=$(cat setup.cfg pyproject.toml launch/constraints.txt | cksum)
  if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    [ -x "$venv/bin/pip" ] || mcm_run "$python" -m venv "$venv" || return 1
    echo "installing mcm_jax${extras:+[$extras]} into .venv (a minute or two, once)"
    mcm_run "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
      --constraint launch/constraints.txt --editable ".${extras:+[$extras]}" || return 1
    # Written last: an interrupted installation is made again.
    [ -n "${MCM_DRY_RUN:-}" ] || printf '%s\n' "$wanted" >"$stamp"
  fi
  export PATH="$venv/bin:$PATH"
}
