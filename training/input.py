"""Which loader brings a job's clips to its device, and with what it decodes."""

import os

import torch

from distributed.backend import Backend
from distributed.topology import Topology
from pipelines.dali import DaliError, DaliLoader, choose_feed, describe, import_dali
from pipelines.decode import choose_decoder
from pipelines.loader import ClipBatch, ClipLoader, ClipSource, EvaluationClips, TrainingClips
from pipelines.manifest import Manifest

from .errors import ConfigError
from .schema import Config

Loader = ClipLoader[ClipBatch] | DaliLoader


def find_decoder(config: Config) -> str:
    """The decoder of the host's processes. Raises ConfigError with the remedy when it, or DALI where it is wanted, is not there."""
    try:
        if config.pipeline.loader == "dali":
            import_dali()
        return choose_decoder(config.pipeline.decoder)
    except (DaliError, ValueError) as error:
        raise ConfigError(str(error)) from error


def source_of(config: Config, manifest: Manifest, device: torch.device) -> ClipSource:
    """Where clips come from. Finds out what DALI can decode, which takes a moment, and not when the first batch is waited for."""
    decoder = find_decoder(config)
    if config.pipeline.loader == "dali":
        choose_feed(manifest.path, device)
    return ClipSource(manifest.path, decoder)


def make_loader(config: Config, dataset: TrainingClips | EvaluationClips, backend: Backend) -> Loader:
    pipeline = config.pipeline
    if pipeline.loader == "dali":
        threads = dali_threads(config, backend.topology)
        return DaliLoader(dataset, pipeline.workers, pipeline.prefetch, backend.device, threads)
    return ClipLoader(dataset, pipeline.workers, pipeline.prefetch, pin_memory=backend.device.type == "cuda")


def describe_input(config: Config, source: ClipSource, backend: Backend) -> str:
    workers = f"{config.pipeline.workers} workers a process"
    if config.pipeline.loader == "torch":
        return f"decoder {source.decoder} in {workers}"
    feed = describe(choose_feed(source.manifest_path, backend.device), backend.device, source.decoder)
    return f"{feed}; {dali_threads(config, backend.topology)} threads and {workers}"


def dali_threads(config: Config, topology: Topology) -> int:
    """Half of a rank's cores, where nothing else is said: the loader's processes and the step have the rest."""
    return config.pipeline.dali_threads or max(1, int(cores_of_rank(topology) / 2))


def cores_of_rank(topology: Topology) -> float:
    """Those that the launcher has bound this rank to, as Slurm does with --cpus-per-task; else its part of the node's."""
    mine, all_cores = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    return mine / topology.local_size if mine == all_cores else mine
