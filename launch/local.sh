#!/usr/bin/env bash
# Start a run on one machine without Slurm: one process per GPU, or two on the CPU. PROCESSES=N overrides this.
#
#   launch/local.sh experiment=smoke                                   torch.distributed, by launch/local.py
#   launch/local.sh experiment=smoke distributed=horovod               Horovod, by horovodrun
#   launch/local.sh experiment=kinetics_single_node data.root=/data/k400
#   launch/local.sh experiment=kinetics_single_node data.root=/data/k400 numerics=reference     float32
#
# On GPUs it trains with numerics=gpu (bfloat16 autocast), or gpu_fp16 if one of them does not support bfloat16; numerics= overrides
# this. A new start with the same run_id= resumes the run. Exit codes and outcome.json: docs/operating.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bin=${TSM_PYTHON:-.venv/bin/python}
bin=${bin%/*}
[[ -x $bin/python ]] || {
    echo "local: no $bin/python. Fix: make setup, and make horovod for distributed=horovod" >&2
    exit 2
}

# 0 without nvidia-smi.
processes=${PROCESSES:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)}
((processes)) || processes=2
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / processes > 0 ? cores / processes : 1))}

# Python reads the overrides, or the run folder after --run. Its answers are a line each.
answer=$("$bin/python" -m training.config.for_shell values distributed.backend distributed.device -- "$@") || exit $?
{ read -r backend && read -r device; } <<<"$answer"

# Choose by the oldest GPU. Empty without GPUs, or if the driver does not support the field. --run reads all from config.yaml.
numerics=()
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -n | head -n 1 || true)
case $capability in
    [1-7].*) numerics=(numerics=gpu_fp16) ;;
    [1-9]*.*) numerics=(numerics=gpu) ;;
esac
[[ ${1:-} != --run && $device != cpu ]] || numerics=()

launcher=("$bin/python" launch/local.py --processes "$processes")
[[ $backend != horovod ]] || launcher=("$bin/horovodrun" --gloo -np "$processes" "$bin/python")
exec "${launcher[@]}" train.py "${numerics[@]}" "$@"
