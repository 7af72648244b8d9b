# shellcheck shell=bash
# Site variables of the batch scripts, with defaults for a plain Slurm cluster. For your site, copy the closest file of slurm/sites
# to slurm/site.sh (git ignores it) and edit it; TSM_SITE=FILE names another file. A variable that is set when you call sbatch
# overrides both.
#
# Also run `source slurm/site.sh` in the shell that calls sbatch: sbatch reads SBATCH_PARTITION, SBATCH_ACCOUNT etc. from there.

# Interpreter with the project's packages; relative to the checkout, or absolute.
: "${TSM_PYTHON:=.venv/bin/python}"

# Modules to load first, separated by blanks: the MPI, CUDA and NCCL that Horovod was built with.
: "${TSM_MODULES:=}"

# Interface of the fast network, as `ip address` names it. Empty: the interface to which the nodes' host names resolve.
: "${TSM_NETWORK_INTERFACE:=}"

# PMI that srun provides to Open MPI and Horovod (`srun --mpi=list`): pmix, or pmi2 if MPI was built for it.
: "${TSM_SRUN_MPI:=pmix}"

# Binding of tasks to cores (srun --cpu-bind). With tasks in blocks, a task's cores are near its GPU on most machines; preflight
# warns if they are not. Empty: no binding.
: "${TSM_CPU_BIND=cores}"

# Additional arguments of the srun that starts the ranks, separated by blanks.
: "${TSM_SRUN_ARGUMENTS:=}"

# Container (enroot and pyxis) for preflight and ranks; empty: none. Mounts in pyxis's syntax; the checkout is always mounted.
: "${TSM_CONTAINER_IMAGE:=}"
: "${TSM_CONTAINER_MOUNTS:=}"

# Node-local disk for logs of the ranks, temporary files and staged files.
: "${TSM_LOCAL_DISK:=${TMPDIR:-/tmp}}"

# A .tar.gz of the environment (slurm/pack_environment.sh) to copy to each node's disk before the ranks start; empty: none.
: "${TSM_ENVIRONMENT_ARCHIVE:=}"

# Copy the data set (data.root) to each node's disk first, as much as fits: on or off. Ranks read the rest from data.root.
: "${TSM_STAGE_DATA:=off}"

# Check all nodes before the job: on, off, or exclude (exclude bad nodes and requeue the job).
: "${TSM_PREFLIGHT:=on}"

# Limits for preflight (slurm/preflight.sh): minimum all-reduce bandwidth between two nodes in MB/s (0: a tenth of the
# faster pairs' bandwidth), maximum latency of 4 bytes in microseconds (0: no limit), maximum clock skew in seconds, minimum free
# space on the local disk in GiB.
: "${TSM_MIN_ALL_REDUCE_MB_S:=0}" "${TSM_MAX_LATENCY_US:=0}" "${TSM_MAX_CLOCK_SKEW_S:=1}" "${TSM_MIN_FREE_GIB:=1}"
export TSM_MIN_ALL_REDUCE_MB_S TSM_MAX_LATENCY_US TSM_MAX_CLOCK_SKEW_S TSM_MIN_FREE_GIB

# Maximum number of requeues of a job.
: "${TSM_MAX_RESTARTS:=20}"
