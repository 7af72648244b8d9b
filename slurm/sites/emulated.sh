# shellcheck shell=bash
# Settings of the emulated cluster (tools/slurm_emulator): TSM_SITE=slurm/sites/emulated.sh sbatch launch/smoke.sh
: "${TSM_LOCAL_DISK:=/mnt/local}"
# Its nodes claim cores that the machine does not have.
: "${TSM_CPU_BIND=}"
: "${TSM_NETWORK_INTERFACE:=eth0}"
# Open MPI refuses to run as root, and its shared-memory transport needs ptrace across the nodes' namespaces.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
# Its local disks have 1 GiB.
: "${TSM_MIN_FREE_GIB:=0.1}"
