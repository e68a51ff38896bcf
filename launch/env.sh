# shellcheck shell=bash
# source launch/env.sh        (bash or zsh, on Linux or in WSL, from any directory)
#
# Activates .venv, with the packages of constraints.txt in it. Where it is missing or out of date it is made first, which takes a minute or
# two; it says before what it will download. Settings, all optional:
#   PYTHON=python3.12          the interpreter that makes .venv (3.11 or newer)
#   PIP_INDEX_URL, PIP_...     pip's settings and its configuration files are respected, although uv installs. For torch's CPU build, which is
#                              2.5 GB less to download:
#                              export PIP_INDEX_URL=https://download.pytorch.org/whl/cpu PIP_EXTRA_INDEX_URL=https://pypi.org/simple
#   POSTTRAIN_EXTRAS=wandb     optional packages of setup.py to have as well, by comma: wandb, fa4, test, dev, docs

_posttrain_script() { # the path of this file; fails where it is not being sourced, or by a shell that does not tell the path
    if [ -n "${BASH_VERSION:-}" ]; then
        # shellcheck disable=SC2128,SC2016 # other shells parse this, too
        eval '[ "${BASH_SOURCE[0]}" != "$0" ] && echo "${BASH_SOURCE[0]}"'
    elif [ -n "${ZSH_VERSION:-}" ]; then
        # shellcheck disable=SC2016
        eval '[[ $ZSH_EVAL_CONTEXT == *:file:* ]] && echo "${(%):-%x}"'
    else
        false
    fi
}

_posttrain_python() { # names a Python of 3.11 or newer with its venv module, or says which it saw
    local name version seen=""
    if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3 python3.13 python3.12 python3.11; fi
    for name in "$@"; do
        if version="$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2]); import ensurepip, venv' 2>/dev/null)"; then
            case "$version" in 3.1[1-9] | 3.[2-9][0-9])
                echo "$name"
                return
                ;;
            esac
            seen="$seen; $name is $version"
        elif [ -n "$version" ]; then
            seen="$seen; $name ($version) lacks its venv module (Debian: python$version-venv)"
        fi
    done
    [ -n "$seen" ] || seen="; there is no $1"
    echo "env.sh: Python 3.11 or newer is needed${seen}; install one, or name one with PYTHON=python3.12" >&2
    return 1
}

_posttrain_env() {
    local root python script system
    script="$(_posttrain_script)" || {
        echo "env.sh: type, in bash or zsh: source launch/env.sh    (started by itself it could not change your shell)" >&2
        return 1
    }
    system="$(uname -s)"
    [ "$system" = Linux ] || {
        echo "env.sh: DeepSpeed and this project run on Linux, and this is $system: use a Linux machine or, on Windows, WSL" >&2
        return 1
    }
    root="$(CDPATH="" builtin cd "$(dirname "$script")/.." && pwd -P)" || return 1
    python="$root/.venv/bin/python"
    set -- env "PYTHON=${PYTHON:-}" "POSTTRAIN_EXTRAS=${POSTTRAIN_EXTRAS:-}" # zsh does not export them from before `source`
    if ! "$@" "$python" -IS "$root/launch/set_up.py" --check 2>/dev/null; then
        python="$(_posttrain_python)" && "$@" "$python" -I "$root/launch/set_up.py" || return 1
    fi
    # shellcheck disable=SC1091 # .venv is not there when the scripts are checked
    source "$root/.venv/bin/activate"
    export PYTHONUTF8=1 # libraries read and write text in the locale's encoding, and theirs is UTF-8
}

# --help is for this file unless a script reads it, whose arguments are seen here in bash
if [ "${1:-}" = --help ] && { [ -z "${BASH_VERSION:-}" ] || [ "${#BASH_SOURCE[@]}" -eq 1 ]; }; then
    sed -nE '2,/^$/s/^#( |$)//p' "$(_posttrain_script || echo "$0")"
else
    _posttrain_env
fi
