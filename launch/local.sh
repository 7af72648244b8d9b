#!/usr/bin/env bash
# One machine without Slurm: a process for each GPU, or two on the CPU. PROCESSES=N says otherwise.
#
#   launch/local.sh experiment=smoke                                   torch.distributed, by torchrun
#   launch/local.sh experiment=smoke distributed=horovod               Horovod, by horovodrun
#   launch/local.sh experiment=kinetics_single_node data.root=/data/k400
#
# Starting it again with the same run_id= goes on. Exit codes and outcome.json: docs/operating.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bin=${TSM_PYTHON:-.venv/bin/python}
bin=${bin%/*}
[[ -x $bin/python ]] || {
    echo "local: no $bin/python. Fix: make setup, and make horovod for distributed=horovod" >&2
    exit 2
}

processes=${PROCESSES:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)} # without the program: 0
((processes)) || processes=2
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / processes > 0 ? cores / processes : 1))}

launcher=("$bin/torchrun" --standalone --nproc-per-node "$processes")
for override; do
    case $override in
        distributed=horovod | distributed=horovod_gloo | distributed.backend=horovod)
            launcher=("$bin/horovodrun" --gloo -np "$processes" "$bin/python")
            ;;
        distributed=torch | distributed.backend=torch)
            launcher=("$bin/torchrun" --standalone --nproc-per-node "$processes")
            ;;
    esac
done
exec "${launcher[@]}" train.py "$@"
