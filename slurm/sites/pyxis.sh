# shellcheck shell=bash
# An example for a cluster with containers by enroot and pyxis (DGX systems): the image contains torch, Horovod, DALI and MPI.
# Copy to slurm/site.sh and edit. Not tested: no such cluster was available.
export SBATCH_PARTITION=batch SBATCH_ACCOUNT=my_project

: "${TSM_CONTAINER_IMAGE:=/shared/images/tsm.sqsh}"
: "${TSM_CONTAINER_MOUNTS:=/shared/data:/shared/data,/raid:/raid}"
# In the image. The batch script also composes the configuration in the container.
: "${TSM_PYTHON:=/usr/bin/python3}"
: "${TSM_LOCAL_DISK:=/raid/tmp}"
: "${TSM_NETWORK_INTERFACE:=bond0}"
