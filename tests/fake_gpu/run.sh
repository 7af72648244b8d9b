#!/usr/bin/env bash
# tests/fake_gpu/run.sh PYTHON ARGS...: run a Python that has torch's CUDA build on a GPU that computes nothing.
# FAKE_GPUS=2 shows two devices.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=$("$1" "$here/build.py")
export LD_PRELOAD=$folder/libfake_gpu.so LD_LIBRARY_PATH=$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
# Only the seventh interface of cuDNN is there.
export TORCH_CUDNN_V8_API_DISABLED=1
exec "$@"
