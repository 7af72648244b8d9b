#!/usr/bin/env bash
# Something-Something v2 on one node of 8 GPUs, with the recipe of the official code: batch 64, 50 epochs from ImageNet weights;
# 61.2% top-1 published with two clips at full resolution. At the throughput published for Kinetics, 22.2 clips/s per V100, it takes
# 13 hours.
# numerics=gpu (bfloat16 autocast) is for A100, H100 and later; on V100 use numerics=gpu_fp16. The official code computes in
# float32: numerics=reference.
#
#   sbatch launch/something_v2_single_node.sh data.root=/scratch/something_v2
#   sbatch launch/something_v2_single_node.sh model=tsm_resnet101
#
# Check first:
#   .venv/bin/python plan.py experiment=something_v2      the recipe, and what would keep it from starting
#   sbatch --test-only launch/something_v2_single_node.sh            would Slurm take it?
#   TSM_CHECK_ONLY=1 sbatch launch/something_v2_single_node.sh       a job that composes and checks its nodes, and stops there
#
#SBATCH --job-name=tsm-something-v2-8
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=7
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --exclusive

checkout=${TSM_CHECKOUT:-${SLURM_SUBMIT_DIR:-$PWD}}
# shellcheck source-path=SCRIPTDIR/.. source=slurm/job.sh
source "$checkout/slurm/job.sh" || {
    echo "$checkout is not the checkout. Fix: cd CHECKOUT && sbatch launch/something_v2_single_node.sh, or TSM_CHECKOUT=FOLDER" >&2
    exit 2
}
run_job experiment=something_v2 distributed=horovod distributed.device=cuda numerics=gpu "$@"
