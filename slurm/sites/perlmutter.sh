# shellcheck shell=bash
# Like NERSC's Perlmutter: 4 A100 a node, Slingshot, Cray MPICH. sbatch --nodes=384 --ntasks-per-node=4 --gres=gpu:4 \
#   --cpus-per-task=32 launch/kinetics_1536.sh. Copy to slurm/site.sh and edit. Not tried there.
export SBATCH_ACCOUNT=m0000_g SBATCH_CONSTRAINT=gpu SBATCH_QOS=regular

: "${TSM_MODULES:=PrgEnv-gnu cudatoolkit nccl}"
# Cray MPICH speaks PMI2 through cray_shasta; Horovod over Gloo (distributed=horovod_gloo) needs no MPI at all.
: "${TSM_SRUN_MPI:=cray_shasta}"
: "${TSM_NETWORK_INTERFACE:=hsn0}"
: "${TSM_LOCAL_DISK:=/tmp}"
