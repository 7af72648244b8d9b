#!/usr/bin/env bash
# usage: slurm/preflight.sh [--bad-nodes-file FILE] [--run-folder FOLDER] [-- SRUN_ARGUMENT...]
# Check the nodes of the current allocation before a job starts on them: print a table, and a line `BAD node: what. Fix: how` for each
# fault. Arguments after `--` go to srun (a container, a binding). Takes minutes at most, even if nodes hang.
#
# On each node: GPUs (count, uncorrected memory errors, pending repairs, slowdown), the clock, the local disk (free space, a file
# written, synced and read back), what ranks inherit (shared memory, TMPDIR, user, home), the job's FOLDER, versions (the same on
# all nodes). On each rank: rank and world size against Slurm's, and whether its
# cores are near its GPU (a note, no fault). Between nodes: all-reduce by torch.distributed (NCCL if torch finds GPUs, else Gloo), in
# pairs of neighbours with different partners per round, which separates a slow node from its partners; then over all nodes. On one
# node: among its ranks.
#
# Variables, with their defaults:
#   TSM_PYTHON                  interpreter with the job's packages (.venv/bin/python)
#   TSM_GPUS_PER_NODE           GPUs that each node must have (SLURM_GPUS_ON_NODE; 0: no GPU check)
#   TSM_LOCAL_DISK              folder on node-local disk (TMPDIR, /tmp)
#   TSM_MIN_FREE_GIB            free space it must have (0)
#   TSM_MAX_CLOCK_SKEW_S        difference between a node's clock and the others' (1)
#   TSM_MIN_ALL_REDUCE_MB_S     bus bandwidth between two nodes, and over all: 2 (n - 1) / n bytes/s, as in nccl-tests
#                               (between two: a tenth of the faster pairs' bandwidth; over all: no limit)
#   TSM_MAX_LATENCY_US          time of an all-reduce of 4 bytes between two nodes (no limit)
#   TSM_PREFLIGHT_ALL_REDUCE    on; off skips the all-reduce, which needs torch
#   TSM_PREFLIGHT_LIMIT_S       seconds for each of the two parts, node by node and all-reduce (300)
#
# Exit codes: 0 no fault; 2 the named nodes are bad; 3 a fault, such as a slow network, of no single node; 4 the checks could not run;
# 64 wrong usage. FILE has one name per line, and exists only after exit code 2.
#
# Untested on GPUs: NCCL, and nvidia-smi's answers for a faulty GPU, follow the documentation only.
set -euo pipefail

bad_nodes_file="" run_folder=()
while (($#)); do
    case $1 in
        --bad-nodes-file) bad_nodes_file=${2:?--bad-nodes-file FILE} && shift 2 ;;
        --run-folder) run_folder=(--run-folder "${2:?--run-folder FOLDER}") && shift 2 ;;
        --) shift && break ;;
        *)
            sed -n '2,3s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
            exit 64
            ;;
    esac
done
srun_arguments=("$@")

: "${SLURM_JOB_ID:?preflight runs inside an allocation. Fix: call it from a batch script, or salloc}"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${TSM_PYTHON:-.venv/bin/python}
gpus=${TSM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}
tasks=${SLURM_NTASKS:-$SLURM_JOB_NUM_NODES}
limit_s=${TSM_PREFLIGHT_LIMIT_S:-300}
all_reduce=${TSM_PREFLIGHT_ALL_REDUCE:-on}
disk=${TSM_LOCAL_DISK:-${TMPDIR:-/tmp}}
# Thousands of ranks writing .pyc files would overload a shared file system.
export PYTHONDONTWRITEBYTECODE=1
# Otherwise torch warns about every connection from an address without a host name.
export TORCH_CPP_LOG_LEVEL=ERROR

# Print the tasks' reports, lines of JSON, mixed with other output of tasks and srun.
ask() {
    timeout --kill-after=10 "$limit_s" srun --overlap --mpi=none --kill-on-bad-exit=0 --wait="$limit_s" --input=none \
        "${srun_arguments[@]}" "$@" 2>&1
}

# A node's own checks look at all its GPUs, however the job's tasks will share them.
shape=(--ntasks="$tasks")
((gpus == 0)) || shape+=(--gpu-bind=none)
code=0
reports=$(ask "${shape[@]}" "$python" -m slurm.preflight.node --gpus "$gpus" --local-disk "$disk" --limit-s "$limit_s" "${run_folder[@]}") || code=$?
if ((code)); then
    # A task that did not start or end would hang the all-reduce as well.
    all_reduce=off
    reports+=$'\n'"{\"preflight\": \"unfinished\", \"code\": $code}"
fi

if [[ $all_reduce != off ]]; then
    # One task per GPU, as in the job; without GPUs one per node.
    ((gpus > 0)) || shape=(--ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1)
    reports+=$'\n'$(ask "${shape[@]}" "$python" -m slurm.preflight.network --limit-s "$limit_s" \
        --min-mb-s "${TSM_MIN_ALL_REDUCE_MB_S:-0}" --max-latency-us "${TSM_MAX_LATENCY_US:-0}") || true
fi

judge=("$python" -m slurm.preflight.judge --tasks "$tasks" --gpus "$gpus" --local-disk "$disk"
    --min-free-gib "${TSM_MIN_FREE_GIB:-0}" --max-clock-skew-s "${TSM_MAX_CLOCK_SKEW_S:-1}"
    --min-mb-s "${TSM_MIN_ALL_REDUCE_MB_S:-0}" --max-latency-us "${TSM_MAX_LATENCY_US:-0}"
    --all-reduce "$all_reduce"
    --nodes "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd, -)")
# The interpreter may exist only in the container.
[[ -x $python ]] || judge=(srun --overlap --mpi=none --nodes=1 --ntasks=1 "${srun_arguments[@]}" "${judge[@]}")
code=0
verdict=$("${judge[@]}" <<<"$reports") || code=$?
grep -v '^bad-nodes: ' <<<"$verdict" || true
if ((code == 2)) && [[ -n $bad_nodes_file ]]; then
    sed -n 's/^bad-nodes: //p' <<<"$verdict" | tr ' ' '\n' >"$bad_nodes_file"
fi
# Any other code comes from Python or srun.
((code == 0 || code == 2 || code == 3)) || code=4
exit "$code"
