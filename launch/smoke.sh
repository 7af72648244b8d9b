#!/usr/bin/env bash
# The smoke test on any Slurm: 8 CPU processes on 4 nodes learn the order of frames in generated clips, in minutes. Needs no GPU.
# Run once before: make smoke (or: make setup horovod, .venv/bin/python prepare.py shapes).
#
#   sbatch launch/smoke.sh                                             Horovod, ranks find each other by MPI (srun --mpi=pmix)
#   sbatch launch/smoke.sh distributed=horovod_gloo                    Horovod without MPI (plain srun)
#   sbatch --nodes=2 launch/smoke.sh distributed=torch                 torch.distributed (plain srun)
#
# Check first:
#   .venv/bin/python plan.py experiment=smoke      the recipe, and what would keep it from starting
#   sbatch --test-only launch/smoke.sh            would Slurm take it?
#   TSM_CHECK_ONLY=1 sbatch launch/smoke.sh       a job that composes and checks its nodes, and stops there
#
#SBATCH --job-name=tsm-smoke
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=1
#SBATCH --time=00:30:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

checkout=${TSM_CHECKOUT:-${SLURM_SUBMIT_DIR:-$PWD}}
# shellcheck source-path=SCRIPTDIR/.. source=slurm/job.sh
source "$checkout/slurm/job.sh" || {
    echo "$checkout is not the checkout. Fix: cd CHECKOUT && sbatch launch/smoke.sh, or TSM_CHECKOUT=FOLDER" >&2
    exit 2
}
run_job experiment=smoke distributed=horovod distributed.device=cpu "$@"
