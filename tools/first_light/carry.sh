# Functions of wheels.sh and dali.sh, which source this file with `python` set and the checkout as working folder.
# shellcheck shell=bash disable=SC2154

# Print a package with its version from constraints.txt.
pinned() {
    grep --extended-regexp --max-count=1 "^$1==" constraints.txt
}

# Download wheels for the GPU machine's Python 3.12: download FOLDER PACKAGE...
download() {
    local platforms=(--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64)
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
        --dest "$@"
}

# Fail if a folder holds more than can be carried: check_size FOLDER MOST_MIB FIX
check_size() {
    local size_mib
    ls -l "$1"
    size_mib=$(du --summarize --apparent-size --block-size=1M "$1" | cut -f1)
    echo "$1: $size_mib MiB"
    if ((size_mib > $2)); then
        echo "first light: $1 holds $size_mib MiB, and $2 MiB is the most that can be carried. Fix: $3" >&2
        exit 1
    fi
}
