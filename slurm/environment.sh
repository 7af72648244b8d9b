# shellcheck shell=bash
# Environment variables of the ranks, each with its reason. For NCCL, Horovod and MPI all other variables keep their defaults.

set_environment() {
    # srun does not inherit sbatch's --cpus-per-task (Slurm 22.05 and later).
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

    # With GPUs, cores decode clips, one core per worker, and a rank's own threads only launch kernels. On CPUs, threads train.
    if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then
        workers=$((SRUN_CPUS_PER_TASK > 1 ? SRUN_CPUS_PER_TASK - 1 : 1))
    else
        workers=1
    fi
    # Read by torch, NumPy and DALI at import. Without it each rank starts a thread for each core of the node.
    export OMP_NUM_THREADS=$((SRUN_CPUS_PER_TASK > workers ? SRUN_CPUS_PER_TASK - workers : 1))

    # Write lines of ranks to the log immediately.
    export PYTHONUNBUFFERED=1
    # Otherwise 1,536 ranks would write the same .pyc files to a shared file system at once.
    export PYTHONDONTWRITEBYTECODE=1
    # Temporary files, logs of ranks and Triton's cache (runtime/environment.py) stay on the node.
    export TMPDIR=$TSM_LOCAL_DISK

    if [[ -n $TSM_NETWORK_INTERFACE ]]; then
        # Otherwise NCCL, Gloo, Horovod and MPI each choose an interface, possibly one of the slow management network.
        export NCCL_SOCKET_IFNAME=$TSM_NETWORK_INTERFACE
        export GLOO_SOCKET_IFNAME=$TSM_NETWORK_INTERFACE
        export HOROVOD_GLOO_IFACE=$TSM_NETWORK_INTERFACE
        export OMPI_MCA_btl_tcp_if_include=$TSM_NETWORK_INTERFACE
    fi

    # With Horovod, MPI sends small control messages over TCP, and without NCCL also the gradients. UCX and openib would register
    # InfiniBand memory for that, and forking loader processes is not safe with registered memory.
    export OMPI_MCA_pml=ob1 OMPI_MCA_btl=self,vader,tcp

    # A waiting rank yields its core to the decoders. This costs microseconds per message.
    export OMPI_MCA_mpi_yield_when_idle=1

    # By default Horovod waits forever for a rank that hangs. This comes after distributed.hang_timeout_s (300, four times as long
    # for a disk), whose report names the rank.
    export HOROVOD_STALL_SHUTDOWN_TIME_SECONDS=1500
}
