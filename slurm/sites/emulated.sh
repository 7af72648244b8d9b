# shellcheck shell=bash
# The emulated cluster (tools/slurm_emulator): TSM_SITE=slurm/sites/emulated.sh sbatch launch/smoke.sh
: "${TSM_LOCAL_DISK:=/mnt/local}"
: "${TSM_CPU_BIND=}" # its nodes claim cores that the machine does not have
: "${TSM_NETWORK_INTERFACE:=eth0}"
# Open MPI refuses root, and its shared-memory transport wants to trace across the nodes' namespaces.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
: "${TSM_MIN_FREE_GIB:=0.1}" # of 1 GiB
