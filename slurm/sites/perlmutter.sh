# shellcheck shell=bash
# An example for NERSC's Perlmutter: 4 A100 per node, Slingshot, Cray MPICH. Copy to slurm/site.sh and edit. Not tested there.
#   sbatch --nodes=384 --ntasks-per-node=4 --gres=gpu:4 --cpus-per-task=32 launch/kinetics_1536.sh
export SBATCH_ACCOUNT=m0000_g SBATCH_CONSTRAINT=gpu SBATCH_QOS=regular

: "${TSM_MODULES:=PrgEnv-gnu cudatoolkit nccl}"
# Cray MPICH uses PMI2 through cray_shasta. Horovod over Gloo (distributed=horovod_gloo) needs no MPI.
: "${TSM_SRUN_MPI:=cray_shasta}"
: "${TSM_NETWORK_INTERFACE:=hsn0}"
: "${TSM_LOCAL_DISK:=/tmp}"
