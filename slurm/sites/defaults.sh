# shellcheck shell=bash
# What the batch scripts ask of a site, with the defaults of a plain Slurm cluster. For yours, copy what fits to slurm/site.sh (git
# ignores it) and edit it; TSM_SITE=FILE names another. A variable that is set when you call sbatch wins over both.
#
# `source slurm/site.sh` in the shell that calls sbatch, too: sbatch reads SBATCH_PARTITION, SBATCH_ACCOUNT and the like there.

# The interpreter that has the project's packages; relative to the checkout, or absolute.
: "${TSM_PYTHON:=.venv/bin/python}"

# Modules to load first, separated by blanks: MPI, CUDA and NCCL that Horovod was built with.
: "${TSM_MODULES:=}"

# Network interface of the fast network, as `ip address` names it. Empty: what the nodes' host names lead to.
: "${TSM_NETWORK_INTERFACE:=}"

# The PMI that srun offers to Open MPI and Horovod (`srun --mpi=list`): pmix, or pmi2 where MPI was built for it.
: "${TSM_SRUN_MPI:=pmix}"

# How srun binds tasks to cores (srun --cpu-bind). With tasks in blocks, a task's cores are near its GPU on most machines; the
# preflight warns where they are not. Empty: not at all.
: "${TSM_CPU_BIND=cores}"

# Further arguments of the srun that starts the ranks, separated by blanks.
: "${TSM_SRUN_ARGUMENTS:=}"

# A container (enroot and pyxis) for preflight and ranks; empty: none. Mounts as pyxis takes them; the checkout is always mounted.
: "${TSM_CONTAINER_IMAGE:=}"
: "${TSM_CONTAINER_MOUNTS:=}"

# Node-local disk: logs of the ranks, temporary files, what is staged.
: "${TSM_LOCAL_DISK:=${TMPDIR:-/tmp}}"

# A .tar.gz of the environment (slurm/pack_environment.sh) to send to each node's disk before the ranks start; empty: none.
: "${TSM_ENVIRONMENT_ARCHIVE:=}"

# Copy the data set (data.root) to each node's disk first, as much as fits: on or off. The rest is read where it is.
: "${TSM_STAGE_DATA:=off}"

# Check all nodes before the job: on, off, or exclude (leave bad nodes out and queue the job again).
: "${TSM_PREFLIGHT:=on}"

# What each node must have (slurm/preflight.sh): an all-reduce between two nodes in MB/s (0: a tenth of what the quicker pairs have) and,
# of 4 bytes, in microseconds (0: no limit); clocks that differ by so much; free space on its disk.
: "${TSM_MIN_ALL_REDUCE_MB_S:=0}" "${TSM_MAX_LATENCY_US:=0}" "${TSM_MAX_CLOCK_SKEW_S:=1}" "${TSM_MIN_FREE_GIB:=1}"
export TSM_MIN_ALL_REDUCE_MB_S TSM_MAX_LATENCY_US TSM_MAX_CLOCK_SKEW_S TSM_MIN_FREE_GIB

# How often a job may be queued again.
: "${TSM_MAX_RESTARTS:=20}"
