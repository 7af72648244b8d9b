# shellcheck shell=bash
# Variables for the ranks, each with its reason. Nothing else is set for NCCL, Horovod or MPI: their defaults are meant.

set_environment() {
    # srun does not take over sbatch's --cpus-per-task (Slurm 22.05 and later).
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

    # On GPUs cores are for decoding, one a worker, and a rank's own threads only start kernels. On CPUs threads do the training.
    if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then
        workers=$((SRUN_CPUS_PER_TASK > 1 ? SRUN_CPUS_PER_TASK - 1 : 1))
    else
        workers=1
    fi
    # Read by torch, NumPy and DALI when they are loaded: without it each rank makes a thread for each core of the node.
    export OMP_NUM_THREADS=$((SRUN_CPUS_PER_TASK > workers ? SRUN_CPUS_PER_TASK - workers : 1))

    # Lines of ranks reach the log when they are printed.
    export PYTHONUNBUFFERED=1
    # 1,536 ranks would write .pyc files of the same modules to a shared file system at once.
    export PYTHONDONTWRITEBYTECODE=1
    # Temporary files and logs of ranks: on the node.
    export TMPDIR=$TSM_LOCAL_DISK
    # Kernels that Triton compiles, once a node. The default is in the home folder, which all ranks would write at once.
    export TRITON_CACHE_DIR=$TSM_LOCAL_DISK/triton

    if [[ -n $TSM_NETWORK_INTERFACE ]]; then
        # Each picks an interface by itself, and not all the same one: management networks lead nowhere fast.
        export NCCL_SOCKET_IFNAME=$TSM_NETWORK_INTERFACE
        export GLOO_SOCKET_IFNAME=$TSM_NETWORK_INTERFACE
        export HOROVOD_GLOO_IFACE=$TSM_NETWORK_INTERFACE
        export OMPI_MCA_btl_tcp_if_include=$TSM_NETWORK_INTERFACE
    fi

    # Under Horovod MPI carries small control messages; NCCL, or this TCP, the gradients. UCX and openib would take InfiniBand
    # memory of their own for it, and fork() of the loaders' processes is not safe with registered memory.
    export OMPI_MCA_pml=ob1 OMPI_MCA_btl=self,vader,tcp

    # A rank that waits leaves its core to the decoders. Costs microseconds a message.
    export OMPI_MCA_mpi_yield_when_idle=1

    # Horovod alone would wait for ever for a rank that hangs. Behind distributed.hang_timeout_s (300), whose report names it.
    export HOROVOD_STALL_SHUTDOWN_TIME_SECONDS=900
}
