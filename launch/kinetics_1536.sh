#!/usr/bin/env bash
# Kinetics-400 on 1,536 GPUs, as in "Training Kinetics in 15 Minutes" (arXiv:1910.00932): TSM ResNet-50, batch 12,288, 100 epochs.
# Published there: 14 min 13 s to 74.0% top-1 on 256 nodes of 6 V100 (Summit). We have not run it at that size.
# numerics=gpu_fp16 (float16 autocast) is for V100, which do not support bfloat16. The precision of the published run is unknown.
# numerics=reference is float32.
#
#   sbatch launch/kinetics_1536.sh optimizer=lars data.root=/scratch/k400
#   sbatch --nodes=192 --ntasks-per-node=8 --gres=gpu:8 launch/kinetics_1536.sh numerics=gpu      A100, H100: bfloat16
#   sbatch --nodes=384 --ntasks-per-node=4 --gres=gpu:4 launch/kinetics_1536.sh numerics=gpu
#
# Check first:
#   .venv/bin/python plan.py experiment=kinetics_1536      the recipe, and what would keep it from starting
#   sbatch --test-only launch/kinetics_1536.sh            would Slurm take it?
#   TSM_CHECK_ONLY=1 sbatch launch/kinetics_1536.sh       a job that composes and checks its nodes, and stops there
#
#SBATCH --job-name=tsm-kinetics-1536
#SBATCH --nodes=256
#SBATCH --ntasks-per-node=6
#SBATCH --gres=gpu:6
#SBATCH --cpus-per-task=7
#SBATCH --time=00:45:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --exclusive

checkout=${TSM_CHECKOUT:-${SLURM_SUBMIT_DIR:-$PWD}}
# shellcheck source-path=SCRIPTDIR/.. source=slurm/job.sh
source "$checkout/slurm/job.sh" || {
    echo "$checkout is not the checkout. Fix: cd CHECKOUT && sbatch launch/kinetics_1536.sh, or TSM_CHECKOUT=FOLDER" >&2
    exit 2
}
run_job experiment=kinetics_1536 distributed=horovod distributed.device=cuda numerics=gpu_fp16 "$@"
