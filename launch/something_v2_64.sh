#!/usr/bin/env bash
# Something-Something v2 on 64 GPUs: the official recipe at batch 512, its rate scaled linearly to 0.08 with 5 epochs of warm-up.
# Not a published run: the batch size is ours. At the throughput published for Kinetics, 22.2 clips/s per V100, it takes
# 100 minutes.
# numerics=gpu (bfloat16 autocast) is for A100, H100 and later; on V100 use numerics=gpu_fp16. numerics=reference is float32.
#
#   sbatch launch/something_v2_64.sh data.root=/scratch/something_v2
#   sbatch --nodes=16 --ntasks-per-node=4 --gres=gpu:4 launch/something_v2_64.sh
#
# Check first:
#   .venv/bin/python plan.py experiment=something_v2_64      the recipe, and what would keep it from starting
#   sbatch --test-only launch/something_v2_64.sh            would Slurm take it?
#   TSM_CHECK_ONLY=1 sbatch launch/something_v2_64.sh       a job that composes and checks its nodes, and stops there
#
#SBATCH --job-name=tsm-something-v2-64
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=7
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --exclusive

checkout=${TSM_CHECKOUT:-${SLURM_SUBMIT_DIR:-$PWD}}
# shellcheck source-path=SCRIPTDIR/.. source=slurm/job.sh
source "$checkout/slurm/job.sh" || {
    echo "$checkout is not the checkout. Fix: cd CHECKOUT && sbatch launch/something_v2_64.sh, or TSM_CHECKOUT=FOLDER" >&2
    exit 2
}
run_job experiment=something_v2_64 distributed=horovod distributed.device=cuda numerics=gpu "$@"
