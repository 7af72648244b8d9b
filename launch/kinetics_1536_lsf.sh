#!/usr/bin/env bash
# The 1,536-GPU run on a machine with LSF and jsrun, like Summit: an example to edit. Never run.
#
#   bsub launch/kinetics_1536_lsf.sh                      bsub passes no arguments: put overrides into the last line
#
# This script does not do the work of slurm/job.sh: no preflight, no requeue. A new job with the same run_id resumes the run.
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
# metrics.jsonl counts from here.
TSM_JOB_START=$(date +%s.%N)
export TSM_JOB_START
# One resource set per node, in which all 6 tasks see all 6 GPUs: NCCL then finds NVLink, and the local rank selects the GPU.
ranks=(jsrun --nrs 256 --rs_per_host 1 --tasks_per_rs 6 --gpu_per_rs 6 --cpu_per_rs 42 --bind packed:7 --latency_priority gpu-cpu)
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 TMPDIR=/mnt/bb/$USER

.venv/bin/python plan.py experiment=kinetics_1536 distributed=horovod numerics=gpu_fp16 "run_id=$run_id" pipeline.workers=6 \
    distributed.world_size=1536 plan.write_config=true
exec "${ranks[@]}" .venv/bin/python train.py --run "outputs/$run_id"
