#!/usr/bin/env bash
# Kinetics-400 on one node of 8 GPUs, with the recipe of the official code: TSM ResNet-50, batch 128, 50 epochs, 71.2% top-1
# published (72.8% with 10 crops). At the throughput published for one node, 22.2 clips/s per V100, it takes 19 hours.
# numerics=gpu (bfloat16 autocast) is for A100, H100 and later; on V100 use numerics=gpu_fp16. The official code computes in
# float32: numerics=reference.
#
#   sbatch launch/kinetics_single_node.sh data.root=/scratch/k400
#   sbatch --ntasks-per-node=4 --gres=gpu:4 launch/kinetics_single_node.sh
#
# Check first:
#   .venv/bin/python plan.py experiment=kinetics_single_node      the recipe, and what would keep it from starting
#   sbatch --test-only launch/kinetics_single_node.sh            would Slurm take it?
#   TSM_CHECK_ONLY=1 sbatch launch/kinetics_single_node.sh       a job that composes and checks its nodes, and stops there
#
#SBATCH --job-name=tsm-kinetics-8
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
    echo "$checkout is not the checkout. Fix: cd CHECKOUT && sbatch launch/kinetics_single_node.sh, or TSM_CHECKOUT=FOLDER" >&2
    exit 2
}
run_job experiment=kinetics_single_node distributed=horovod distributed.device=cuda numerics=gpu "$@"
