#!/bin/sh
# Makes .venv beside this script, or brings it up to date: `sh setup_venv.sh [dev]`. Quick when there is nothing to do.
# What was installed is remembered as a copy of the requirements inside .venv, so that a changed file installs again.
set -eu
cd "$(dirname "$0")"
export PATH # in an empty environment the shell has a PATH of its own, and Python needs to see it

python=.venv/bin/python
# Without pip it is what an interrupted set-up left.
if ! "$python" -c 'import pip' 2>/dev/null; then
    base=""
    for candidate in python3.11 python3 python3.12 python3.13; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            base=$candidate
            break
        fi
    done
    if [ -z "$base" ]; then
        echo "error: Python 3.11 or newer with its venv module is needed: install it and try again" >&2
        exit 2
    fi
    "$base" -m venv .venv
fi

install() { # install the requirements file $1 unless just this file was installed before
    mark=".venv/installed-$1"
    if cmp -s "$1" "$mark"; then
        return
    fi
    echo "installing $1 into .venv (minutes on a new machine)" >&2
    # torch first and alone: its requirement is then met before pip looks at those of the others
    torch=$(grep '^torch==' "$1" || true)
    if [ -n "$torch" ]; then
        "$python" -m pip install -qq "$torch"
    fi
    "$python" -m pip install -qq -r "$1"
    cp "$1" "$mark"
}

install requirements.txt
if [ "${1:-}" = dev ]; then
    install requirements-dev.txt
fi
