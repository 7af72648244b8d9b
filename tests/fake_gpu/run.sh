#!/usr/bin/env bash
# tests/fake_gpu/run.sh PYTHON ARGS...: run a Python with torch's CUDA build on a GPU that computes nothing.
# FAKE_GPUS=2 emulates two devices, FAKE_GPU_BYTES=N limits the memory of all of them together.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=$("$1" "$here/build.py")
export LD_PRELOAD=$folder/libfake_gpu.so LD_LIBRARY_PATH=$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
# Only the v7 API of cuDNN is implemented.
export TORCH_CUDNN_V8_API_DISABLED=1
exec "$@"
