#!/usr/bin/env bash
# usage: tools/setup_venv.sh VENV GROUP...
# Create the virtual environment if it is missing, and install the groups of pyproject.toml in the versions that
# constraints.txt pins. pip refuses a file whose hash is not in requirements.lock.
#   PYTHON  the interpreter (default: python3.11, else a python3 that is new enough)
#   HASHES  off: let pip choose the files, and so torch's build for another CUDA from an index of your choice
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${1:?usage: tools/setup_venv.sh VENV GROUP...}
shift
: "${1:?usage: tools/setup_venv.sh VENV GROUP...}"

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3.11}" python3; do
        if new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: no Python 3.11 or newer (tried ${PYTHON:-python3.11} and python3)" >&2
    echo "  fix: apt-get install python3.11 python3.11-venv python3.11-dev, or make PYTHON=/path/to/python setup" >&2
    exit 1
}

# Horovod and the code that torch.compile generates compile against Python's headers.
check_python() {
    local version
    version=$("$1" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    if ! "$1" -c 'import ensurepip, venv' 2>/dev/null; then
        echo "setup: $1 cannot make virtual environments; fix: apt-get install $version-venv" >&2
        exit 1
    fi
    if ! "$1" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'; then
        echo "setup: $1 has no headers (Python.h); fix: apt-get install $version-dev" >&2
        exit 1
    fi
}

if [[ ! -e $venv/bin/python ]]; then
    python=$(find_python)
    check_python "$python"
    echo "setup: making $venv with $("$python" --version)"
    "$python" -m venv "$venv"
elif ! new_enough "$venv/bin/python"; then
    echo "setup: $venv is broken or older than Python 3.11; fix: rm -rf $venv, then again" >&2
    exit 1
fi

packages() {
    "$venv/bin/python" tools/requirements.py "$@"
}

install() {
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --requirement /dev/stdin "$@"
}

# Pipes, and no files: an error of the first command ends the script too (pipefail).
if [[ ${HASHES:-on} == off ]]; then
    echo "setup: installing $* (pinned by constraints.txt; HASHES=off: pip takes any file of these versions)"
    packages "$@" --without horovod | install --constraint constraints.txt
else
    echo "setup: installing $* (pinned by constraints.txt; files checked by requirements.lock)"
    # An environment that pip makes for the build of a source package would get unchecked build tools: install checked ones first.
    packages --locked sdist | install --require-hashes --no-deps
    packages --locked "$@" | install --require-hashes --no-deps --no-build-isolation
fi
