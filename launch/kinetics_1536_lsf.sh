#!/usr/bin/env bash
# The 1,536-GPU run on a machine with LSF and jsrun, as Summit had it: an example to edit. Nobody has run it.
#
#   bsub launch/kinetics_1536_lsf.sh                      overrides go into the last line: bsub passes none on
#
# What slurm/job.sh does on Slurm is left to you here: no preflight, no queueing again. The same run_id goes on where it stopped.
#BSUB -P PROJECT
#BSUB -J tsm-kinetics-1536
#BSUB -nnodes 256
#BSUB -W 0:45
#BSUB -alloc_flags "nvme smt1"
#BSUB -wt 2
#BSUB -wa USR1
set -euo pipefail

cd "${LS_SUBCWD:?start it with bsub, from the checkout}"
run_id=$LSB_JOBID
# A resource set for each node, with all its 6 GPUs in sight of its 6 tasks: NVLink is found, and the local rank picks the GPU.
ranks=(jsrun --nrs 256 --rs_per_host 1 --tasks_per_rs 6 --gpu_per_rs 6 --cpu_per_rs 42 --bind packed:7 --latency_priority gpu-cpu)
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 TMPDIR=/mnt/bb/$USER

.venv/bin/python plan.py experiment=kinetics_1536 distributed=horovod numerics=gpu_fp16 "run_id=$run_id" pipeline.workers=6 \
    distributed.world_size=1536 plan.write_config=true
exec "${ranks[@]}" .venv/bin/python train.py --run "outputs/$run_id"
