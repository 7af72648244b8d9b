"""Check what a rank inherits before it starts workers, MPI and CUDA."""

from distributed.topology import Topology
from runtime.environment import (
    SHARED_MEMORY,
    EnvironmentFault,
    allow_open_files,
    raise_limits,
    repair,
    shared_memory_bytes,
)
from training.build.data import augmentation_of, protocol_of
from training.config.schema import Config

from .errors import ConfigError
from .recipe import make_execution

# Each semaphore takes a page. A loader has 8, and 3 per worker; training, evaluation and precise BN have one each.
_SEMAPHORE_BYTES = 4096
_LOADERS = 3

# Measured: 35 files of a rank, and 5 per worker. A batch on its way has 4 tensors, each a file.
_FILES_OF_RANK, _FILES_OF_WORKER, _FILES_OF_BATCH = 40, 6, 4


def prepare_environment(config: Config, topology: Topology) -> list[str]:
    """Repair the environment of this rank where possible; returns notes to log. Raises EnvironmentFault with the fix."""
    return [*repair(), *raise_limits(), *_check_loader(config, topology)]


def _check_loader(config: Config, topology: Topology) -> list[str]:
    """Compare the limits of open files and of shared memory with what the loader's workers need."""
    workers, prefetch = config.pipeline.workers, config.pipeline.prefetch
    if not workers:
        return []
    wanted = 3 * _FILES_OF_RANK + 2 * workers * (_FILES_OF_WORKER + _FILES_OF_BATCH * prefetch)
    least = _FILES_OF_RANK + workers * _FILES_OF_WORKER
    allow_open_files(wanted, least, "with these loader workers", ", or fewer pipeline.workers")
    try:
        total, free = shared_memory_bytes()
    except OSError:
        return []
    semaphores = topology.local_size * _LOADERS * (8 + 3 * workers) * _SEMAPHORE_BYTES
    if free < semaphores:
        raise EnvironmentFault(
            f"shared memory is short: {SHARED_MEMORY} has {_mib(free)} of {_mib(total)} free, and the semaphores of the loader "
            f"workers alone take {_mib(semaphores)}. Fix: docker --shm-size=1g, or remove old files in {SHARED_MEMORY}, or "
            "fewer pipeline.workers"
        )
    batches = topology.local_size * loader_bytes(config, topology.size)
    if batches <= free:
        return []
    return [
        f"shared memory: {SHARED_MEMORY} has {_mib(free)} of {_mib(total)} free, and the batches of {topology.local_size} ranks x "
        f"{workers} workers x {prefetch} may take {_mib(batches)}; what does not fit goes through pipes, which takes more time. "
        f"Fix: docker --shm-size={2 * batches // 2**30 + 1}g, or fewer pipeline.workers, pipeline.prefetch or batch.micro_batch"
    ]


def loader_bytes(config: Config, world_size: int) -> int:
    """Estimate the shared memory that one rank's batches take: those prefetched for training and evaluation, and two in use.

    DALI's batches are encoded and smaller; 0 if the batch does not fit the world, which is an error of its own.
    """
    pipeline, batch = config.pipeline, config.batch
    if pipeline.loader != "torch":
        return 0
    try:
        clips = make_execution(batch.global_batch, batch.bn_clips, world_size, batch.micro_batch_limit).micro_batch
    except ConfigError:
        return 0
    protocol = protocol_of(config.model, pipeline, config.evaluation)
    frames = augmentation_of(config.model, config.data, pipeline).sample_frames
    channels = protocol.channels
    training = clips * channels * frames * pipeline.size**2
    # A batch of an evaluation has at least one clip, with all its views.
    evaluation = max(config.evaluation.batch, protocol.views) * channels * config.model.num_frames * protocol.side**2
    return pipeline.workers * pipeline.prefetch * (training + evaluation) + 2 * max(training, evaluation)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
