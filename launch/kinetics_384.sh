#!/usr/bin/env bash
# Kinetics-400 on 384 GPUs: the recipe of kinetics_1536.sh with a quarter of its batch size (3,072) and four times its steps.
# Not a published run. At the step time published for 1,536 GPUs (0.437 s) its 7,806 steps take 57 minutes.
# numerics=gpu_fp16 (float16 autocast) is for V100, as in kinetics_1536.sh; numerics=reference is float32.
#
#   sbatch launch/kinetics_384.sh data.root=/scratch/k400
#   sbatch --nodes=96 --ntasks-per-node=4 --gres=gpu:4 launch/kinetics_384.sh numerics=gpu      A100, H100: bfloat16
#
# Check first:
#   .venv/bin/python plan.py experiment=kinetics_384      the recipe, and what would keep it from starting
#   sbatch --test-only launch/kinetics_384.sh            would Slurm take it?
#   TSM_CHECK_ONLY=1 sbatch launch/kinetics_384.sh       a job that composes and checks its nodes, and stops there
#
#SBATCH --job-name=tsm-kinetics-384
#SBATCH --nodes=64
#SBATCH --ntasks-per-node=6
#SBATCH --gres=gpu:6
#SBATCH --cpus-per-task=7
#SBATCH --time=02:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --exclusive

checkout=${TSM_CHECKOUT:-${SLURM_SUBMIT_DIR:-$PWD}}
# shellcheck source-path=SCRIPTDIR/.. source=slurm/job.sh
source "$checkout/slurm/job.sh" || {
    echo "$checkout is not the checkout. Fix: cd CHECKOUT && sbatch launch/kinetics_384.sh, or TSM_CHECKOUT=FOLDER" >&2
    exit 2
}
run_job experiment=kinetics_384 distributed=horovod distributed.device=cuda numerics=gpu_fp16 "$@"
