# shellcheck shell=bash
# source launch/env.sh        (bash, from any directory)
#
# Activates a complete environment, .venv with the packages of constraints.txt and DeepSpeed's ops compiled, and makes it first where it is
# missing or out of date, which takes a few minutes. Settings, all optional:
#   PYTHON=python3.12          the interpreter that makes .venv (3.11 or newer)
#   PIP_INDEX_URL, PIP_...     pip's own settings are respected, e.g. an index with CPU-only builds of torch

# shellcheck disable=SC1091 # .venv is not there when the scripts are checked
_posttrain_setup() {
    local root python stamp wanted log extras=dev
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)" || return 1
    stamp="$root/.venv/complete"
    wanted="$(cat "$root"/{constraints.txt,setup.py,posttrain/__init__.py,launch/build_ops.py} | cksum)"

    # DeepSpeed's cache of compiled ops is the user's, under names without a version, so two versions on one machine break each other:
    # keep it inside this environment.
    export TORCH_EXTENSIONS_DIR="$root/.venv/torch_extensions"

    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        source "$root/.venv/bin/activate"
        return
    fi

    python="${PYTHON:-}"
    if [ -z "$python" ]; then
        for python in python3 python3.13 python3.12 python3.11 ""; do
            [ -n "$python" ] && "$python" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
        done
    fi
    [ -n "$python" ] || { echo "env.sh: no Python 3.11 or newer with the venv module was found; name one with PYTHON=..." >&2; return 1; }
    command -v c++ >/dev/null || { echo "env.sh: DeepSpeed compiles its ops; install a C++ compiler (Debian: g++)" >&2; return 1; }

    log="$root/.venv/setup.log"
    command -v nvidia-smi >/dev/null && extras=dev,gpu
    (
        flock 9 || exit 1 # two terminals may ask for the environment at once
        [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && exit 0
        echo "Setting up $root/.venv (once; a few minutes). Log: $log"
        { [ -x "$root/.venv/bin/python" ] || "$python" -m venv "$root/.venv"; } &&
            source "$root/.venv/bin/activate" &&
            echo "  installing torch ..." &&
            pip install -q -c "$root/constraints.txt" torch numpy setuptools wheel >"$log" 2>&1 &&
            echo "  installing deepspeed, transformers, datasets ..." &&
            pip install -q -c "$root/constraints.txt" -e "${root}[$extras]" >>"$log" 2>&1 &&
            echo "  compiling DeepSpeed's ops ..." &&
            python "$root/launch/build_ops.py" >>"$log" 2>&1 &&
            echo "$wanted" >"$stamp"
    ) 9>"$root/.setup.lock" || { echo "env.sh: set-up failed; the end of $log:" >&2; tail -n 15 "$log" >&2; return 1; }
    source "$root/.venv/bin/activate"
}

_posttrain_setup
