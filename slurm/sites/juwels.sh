# shellcheck shell=bash
# An example for JSC's JUWELS Booster: 4 A100 per node, InfiniBand. Copy to slurm/site.sh and edit. Not tested there.
#   sbatch --nodes=384 --ntasks-per-node=4 --gres=gpu:4 --cpus-per-task=12 launch/kinetics_1536.sh
export SBATCH_PARTITION=booster SBATCH_ACCOUNT=my_project

: "${TSM_MODULES:=Stages GCC OpenMPI CUDA NCCL}"
: "${TSM_NETWORK_INTERFACE:=ib0}"
# The compute nodes' names for the InfiniBand interfaces end in i: the plain node names resolve to the slower network.
: "${TSM_LOCAL_DISK:=/tmp}"
