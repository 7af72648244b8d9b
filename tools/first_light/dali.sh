#!/usr/bin/env bash
# usage: tools/first_light/dali.sh FOLDER
# Pack NVIDIA DALI for Python 3.12 so small that it can be carried to a GPU machine: without the code of other GPUs and of other
# versions of Python, 49 MiB instead of 390. first_light.sh unpacks it. Needs pip's index, readelf, strip, xz and 2 GB of disk.
#   PYTHON312  python3.12 (default: the one on PATH)
set -euo pipefail
folder=$(realpath -m "${1:?usage: tools/first_light/dali.sh FOLDER}")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source tools/first_light/carry.sh
python=${PYTHON312:-python3.12}
most_mib=56 # the checkout and the other packages have to fit beside it
generation=90 # H100 and H200
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$folder"

fetch() {
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --dest "$work" "$(pinned nvidia-dali-cuda130)"
    "$python" -m zipfile -e "$work"/nvidia_dali_cuda130-*.whl "$work/tree"
    # What it imports. Its libraries that decode images are left out: it loads them only for a graph with images.
    download "$folder" optree gast astunparse makefun
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
check_size "$folder" "$most_mib" "xz -9"
