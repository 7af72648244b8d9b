"""Which loader brings a job's clips to its device, and with what it decodes."""

import os

import torch

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


def make_loader(config: Config, dataset: TrainingClips | EvaluationClips, device: torch.device) -> Loader:
    pipeline = config.pipeline
    if pipeline.loader == "dali":
        return DaliLoader(dataset, pipeline.workers, pipeline.prefetch, device, dali_threads(config))
    return ClipLoader(dataset, pipeline.workers, pipeline.prefetch, pin_memory=device.type == "cuda")


def describe_input(config: Config, source: ClipSource, device: torch.device) -> str:
    workers = f"{config.pipeline.workers} workers a process"
    if config.pipeline.loader == "torch":
        return f"decoder {source.decoder} in {workers}"
    feed = describe(choose_feed(source.manifest_path, device), device, source.decoder)
    return f"{feed}; {dali_threads(config)} threads and {workers}"


def dali_threads(config: Config) -> int:
    """Half of the cores that this process may use, where nothing else is said: the loader's processes and the step have the rest.

    A launcher that binds ranks to cores, as Slurm does with --cpus-per-task, thereby decides.
    """
    return config.pipeline.dali_threads or max(1, len(os.sched_getaffinity(0)) // 2)
