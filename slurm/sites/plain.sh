# shellcheck shell=bash
# An example for a plain cluster: modules, Open MPI with PMIx, InfiniBand or Ethernet. Copy to slurm/site.sh and edit.
export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=my_project

: "${TSM_MODULES:=gcc openmpi cuda nccl}"
: "${TSM_NETWORK_INTERFACE:=ib0}"
: "${TSM_LOCAL_DISK:=/scratch/local}"
