#!/usr/bin/env bash
# usage: tools/first_light/dali.sh FOLDER
# Pack NVIDIA DALI for Python 3.12 so small that it can be carried to a GPU machine: without the code of other GPUs and of other
# versions of Python, 49 MiB instead of 390. first_light.sh unpacks it. Needs pip's index, readelf, strip, xz and 2 GB of disk.
#   PYTHON312  python3.12 (default: the one on PATH)
set -euo pipefail
folder=$(realpath -m "${1:?usage: tools/first_light/dali.sh FOLDER}")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON312:-python3.12}
most_mib=56 # the checkout and the other packages have to fit beside it
generation=90 # H100 and H200
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$folder"

fetch() {
    local pinned
    pinned=$(grep --extended-regexp --max-count=1 '^nvidia-dali-cuda130==' constraints.txt)
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --dest "$work" "$pinned"
    "$python" -m zipfile -e "$work"/nvidia_dali_cuda130-*.whl "$work/tree"
    # What it imports. It loads the libraries for pictures only when a graph decodes pictures; they stay behind.
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        --dest "$folder" optree gast astunparse makefun
}

prune() {
    local library
    cd "$work/tree/nvidia/dali"
    find . -name '*cpython-3*' ! -name '*cpython-312-*' -delete
    rm -rf test include
    for library in libdali_operators.so libdali_kernels.so .libs/libcvcuda*; do
        "$python" "$OLDPWD/tools/first_light/prune_fatbin.py" "$library" "$work/pruned.so" "$generation"
        mv "$work/pruned.so" "$library"
    done
    # Not those in .libs: stripping breaks what patchelf has renamed.
    strip --strip-unneeded ./*.so
    cd "$OLDPWD"
}

fetch
prune
tar --create --directory "$work/tree" . | xz -6 --threads=0 >"$folder/dali.tar.xz"
ls -l "$folder"
size_mib=$(du --summarize --apparent-size --block-size=1M "$folder" | cut -f1)
echo "$folder: $size_mib MiB"
if ((size_mib > most_mib)); then
    echo "first light: $folder holds $size_mib MiB, and $most_mib MiB is the most that can be carried. Fix: xz -9" >&2
    exit 1
fi
