"""Which loader brings a job's clips to its device, and with what it decodes."""

import os

import torch

from distributed.backends.base import Backend
from distributed.topology import Topology
from pipelines.decoding.decode import choose_decoder
from pipelines.loading.clips import ClipBatch, ClipSource, EvaluationClips, TrainingClips
from pipelines.loading.dali_graph import DaliError, import_dali
from pipelines.loading.dali_loader import DaliLoader
from pipelines.loading.dali_support import choose_feed, describe
from pipelines.loading.worker_loader import ClipLoader
from pipelines.manifest import Manifest, ManifestError
from pipelines.stream.augmentation import Augmentation
from pipelines.stream.eval_views import EvalProtocol
from runtime.checkout import CHECKOUT
from training.config.schema import Config
from training.errors import ConfigError, DataError

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


def open_manifest(config: Config, split: str) -> Manifest:
    """A split's manifest, checked against the configuration. Raises DataError that says how to mend it."""
    path = CHECKOUT / config.data.root / getattr(config.data, split)
    remedy = f" Fix: {config.data.prepare}" if config.data.prepare else ""
    try:
        manifest = Manifest.open(path)
    except ManifestError as error:
        raise DataError(f"{error}.{remedy}" if remedy else str(error)) from error
    if len(manifest.classes) != config.data.num_classes:
        raise DataError(f"{path} has {len(manifest.classes)} classes, but data.num_classes={config.data.num_classes}")
    return manifest


def augmentation_of(config: Config) -> Augmentation:
    """What training does to clips: a part of the recipe."""
    pipeline = config.pipeline
    pairs = config.data.mirrored_words if pipeline.flip == "relabel" else []
    return Augmentation(
        num_frames=config.model.num_frames,
        size=pipeline.size,
        sampling=pipeline.sampling,
        crop_scales=tuple(pipeline.crop_scales),
        flip=pipeline.flip,
        mirrored_words=tuple((one.lower(), other.lower()) for one, other in pairs),
    )


def protocol_of(config: Config) -> EvalProtocol:
    """How clips are evaluated: no part of the recipe, so that a run can be evaluated in any way."""
    evaluation, clips = config.evaluation, config.evaluation.clips
    return EvalProtocol(
        num_frames=config.model.num_frames,
        size=config.pipeline.size,
        clips=f"{config.pipeline.sampling}_validation" if clips == "validation" else clips,
        crops=evaluation.crops,
        full_resolution=evaluation.full_resolution,
        portrait_bug=evaluation.portrait_bug,
    )


def training_clips_of(config: Config, source: ClipSource) -> TrainingClips:
    try:
        return TrainingClips(source, augmentation_of(config), config.seed)
    except ValueError as error:
        raise ConfigError(f"pipeline.flip={config.pipeline.flip}: {error}") from error
