#!/usr/bin/env bash
# usage: tools/first_light/wheels.sh FOLDER [HOROVOD_WHEEL]
# Fetch the packages that a bare GPU machine lacks, for Python 3.12 and torch 2.11.0+cu130 on x86-64: about 50 MB. Needs pip's
# index, readelf, strip and xz.
# Without HOROVOD_WHEEL, also build Horovod: this needs Python 3.12 with headers, g++, nvcc 13, 6 GB of disk and 10 minutes on two
# idle cores.
#   PYTHON312  python3.12 (default: the one on PATH)
#   VENV312    environment with that torch, created if missing (default build/first_light/venv312)
set -euo pipefail
folder=$(realpath -m "${1:?usage: tools/first_light/wheels.sh FOLDER [HOROVOD_WHEEL]}")
horovod_wheel=${2:+$(realpath "$2")}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."
source tools/first_light/carry.sh
python=${PYTHON312:-python3.12}
most_mib=63
generation=90 # H100 and H200
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$folder"

# Versions from constraints.txt, except PyAV: its first version with wheels for Python 3.12's stable ABI.
fetch_packages() {
    download "$folder" "$(pinned hydra-core)" "$(pinned omegaconf)" "$(pinned mfusepy)" "$(pinned hypothesis)" av==19.0.2
    "$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder" "$(pinned antlr4-python3-runtime)" # no wheel on the index
}

build_horovod() {
    local venv=${VENV312:-build/first_light/venv312}
    if [[ ! -x $venv/bin/python ]]; then
        "$python" -m venv "$venv"
        "$venv/bin/python" -m pip install --quiet torch==2.11.0 torchvision==0.26.0
    fi
    HOROVOD_MPI=off HOROVOD_BUILD_CUDA_CC_LIST=$generation "$venv/bin/python" -m tools.horovod --build-only |
        tee "$work/horovod.log" >&2
    horovod_wheel=$(grep --only-matching --extended-regexp '/[^ ]+/horovod-[^ ]+\.whl$' "$work/horovod.log" | tail -1)
}

# Strip symbols: Horovod's library shrinks from 21 MB to 1 MB.
strip_horovod() {
    (
        mkdir "$work/horovod"
        cd "$work/horovod"
        "$python" -m zipfile -e "$horovod_wheel" .
        strip --strip-unneeded horovod/torch/mpi_lib_v2*.so
        rm -f "$folder"/horovod-*.whl
        "$python" -m zipfile -c "$folder/$(basename "$horovod_wheel")" ./*
    )
}

# NCCL 2.30 lets two ranks share a GPU (NCCL_MULTI_RANK_GPU_ENABLE=1); torch 2.11 has 2.28.
fetch_nccl() {
    "$python" -m pip download --quiet --no-deps --dest "$work" nvidia-nccl-cu13==2.30.7
    "$python" -m zipfile -e "$work"/nvidia_nccl_cu13-*.whl "$work/nccl"
    "$python" "$here/prune_fatbin.py" "$work/nccl/nvidia/nccl/lib/libnccl.so.2" "$work/libnccl.so.2" "$generation"
    strip --strip-unneeded "$work/libnccl.so.2"
    xz -3 --stdout "$work/libnccl.so.2" >"$folder/libnccl.so.2.xz"
}

fetch_packages
fetch_nccl
[[ -n $horovod_wheel ]] || build_horovod
strip_horovod
check_size "$folder" "$most_mib" "leave a package out"
