#!/usr/bin/env bash
# usage: tools/first_light/first_light.sh OUT [arguments of python -m tools.first_light, such as --dry or --only speed]
# Run first light on a machine with a GPU and without network: create an environment from the machine's torch and the wheels from
# wheels.sh, then run nine minutes of phases. The report, the console log and the trace go to the folder OUT.
#   PYTHON    interpreter with torch (default python3)
#   WHEELS    folder of wheels.sh (default .whl in the checkout; without it, only the interpreter's packages are used)
#   DALI      folder of dali.sh (default .dali in the checkout; without it, the phases with DALI say so)
#   LIMIT_S   seconds in total, including the preparation by this script (default 540)
set -euo pipefail
out=$(realpath -m "${1:?usage: tools/first_light/first_light.sh OUT [--dry] ...}")
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
limit_s=${LIMIT_S:-540}
wheels=$(realpath -m "${WHEELS:-.whl}")
dali=$(realpath -m "${DALI:-.dali}")
python=$(command -v "${PYTHON:-python3}")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$out"
export PYTHONUNBUFFERED=1 WANDB_MODE=offline

# Create a virtual environment on top of the interpreter's packages. The interpreter may itself be in a virtual environment, which
# --system-site-packages would ignore. addsitedir also reads the .pth files there: setuptools's file provides Horovod's launcher
# with distutils, which Python 3.12 no longer has.
make_environment() {
    local parent mine packed
    parent=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$python" -m venv --without-pip "$scratch/venv"
    mine=$("$scratch/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "import site; site.addsitedir('$parent')" >"$mine/parent.pth"
    shopt -s nullglob
    packed=("$wheels"/*.whl "$dali"/*.whl)
    if ((${#packed[@]})); then
        "$python" - "$mine" "${packed[@]}" <<'PY'
import sys
import zipfile

target, *wheels = sys.argv[1:]
for wheel in wheels:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    print("unpacked", wheel)
PY
    fi
    if [[ -e $dali/dali.tar.xz ]]; then
        xz --decompress --threads=0 --stdout "$dali/dali.tar.xz" | tar --extract --directory "$mine"
        echo "unpacked $dali/dali.tar.xz"
    fi
    # The script that pip would write for Horovod's entry point; tests and phases expect it next to the interpreter.
    cat >"$scratch/venv/bin/horovodrun" <<PY
#!$scratch/venv/bin/python
import sys
from horovod.runner.launch import run_commandline

if __name__ == "__main__":
    sys.exit(run_commandline())
PY
    chmod +x "$scratch/venv/bin/horovodrun"
}

# Provide libcuda.so for old Horovod wheels, built before tools/horovod edited this name: drivers install only libcuda.so.1.
link_driver() {
    local real
    "$python" -c 'import ctypes; ctypes.CDLL("libcuda.so")' 2>/dev/null && return
    real=$("$python" -c '
import ctypes
ctypes.CDLL("libcuda.so.1")
print(next(line.split()[-1] for line in open("/proc/self/maps") if "libcuda.so" in line))' 2>/dev/null) || return 0
    mkdir "$scratch/driver"
    ln -s "$real" "$scratch/driver/libcuda.so"
    export LD_LIBRARY_PATH=$scratch/driver${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
}

prepare() {
    make_environment
    link_driver
    if [[ -e $wheels/libnccl.so.2.xz ]]; then
        xz --decompress --stdout "$wheels/libnccl.so.2.xz" >"$scratch/libnccl.so.2"
        nccl=(--nccl "$scratch/libnccl.so.2")
    fi
}

nccl=()
prepare > >(tee "$out/console.log") 2>&1
left_s=$((limit_s - SECONDS - 10))
# The main process enforces the limits of phases; timeout is for the case that this process hangs.
timeout --kill-after=5 "$((left_s + 5))" \
    "$scratch/venv/bin/python" -m tools.first_light --out "$out" --limit-s "$left_s" "${nccl[@]}" "$@" 2>&1 |
    tee -a "$out/console.log"
