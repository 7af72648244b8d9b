# shellcheck shell=bash
# A cluster that runs containers by enroot and pyxis (DGX systems): the image brings torch, Horovod, DALI and MPI. Copy to
# slurm/site.sh and edit. Not tried here: no such cluster was at hand.
export SBATCH_PARTITION=batch SBATCH_ACCOUNT=my_project

: "${TSM_CONTAINER_IMAGE:=/shared/images/tsm.sqsh}"
: "${TSM_CONTAINER_MOUNTS:=/shared/data:/shared/data,/raid:/raid}"
: "${TSM_PYTHON:=/usr/bin/python3}" # in the image; the batch script composes the configuration inside it, too
: "${TSM_LOCAL_DISK:=/raid/tmp}"
: "${TSM_NETWORK_INTERFACE:=bond0}"
