# shellcheck shell=bash
# Like JSC's JUWELS Booster: 4 A100 a node, InfiniBand. sbatch --nodes=384 --ntasks-per-node=4 --gres=gpu:4 --cpus-per-task=12 \
#   launch/kinetics_1536.sh. Copy to slurm/site.sh and edit. Not tried there.
export SBATCH_PARTITION=booster SBATCH_ACCOUNT=my_project

: "${TSM_MODULES:=Stages GCC OpenMPI CUDA NCCL}"
: "${TSM_NETWORK_INTERFACE:=ib0}"
# Names of the InfiniBand interfaces end in i on the compute nodes: node names alone lead to the slower network.
: "${TSM_LOCAL_DISK:=/tmp}"
