"""Build the data side of a job: manifests, clip sources, datasets and loaders."""

import os
import warnings
from collections.abc import Callable

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
from pipelines.stream.mirror_labels import check_flip, find_mirror
from pipelines.stream.modality import FLOW
from runtime.checkout import CHECKOUT
from training.config.schema import DataConfig, EvaluationConfig, ModelConfig, PipelineConfig
from training.errors import ConfigError, DataError

from .class_names import first_difference
from .stream import stream_sampling_of

Loader = ClipLoader[ClipBatch] | DaliLoader


def open_manifest(data: DataConfig, split: str) -> Manifest:
    """Open the manifest of `train`, `val` or `test`. Raises DataError with the fix for one that cannot be used.

    It is missing, changed, has other classes, or is not for tests and has no labels.
    """
    path = CHECKOUT / data.root / getattr(data, split)
    try:
        manifest = Manifest.open(path)
        # On every rank, because a node may have a copy of its own: 0.2 s for 240,000 clips.
        manifest.require_as_written()
    except ManifestError as error:
        fix = data.prepare or "prepare.py (docs/data.md), or data.root=FOLDER of the manifests"
        if split == "test":
            fix += (
                "; the annotations must have a test list (docs/evaluation.md), or data.test=FILE names another manifest"
            )
        raise DataError(f"{error}. Fix: {fix}") from error
    if len(manifest.classes) != data.num_classes:
        raise DataError(
            f"{path} has {len(manifest.classes)} classes, but data.num_classes={data.num_classes}. "
            f"Fix: data.num_classes={len(manifest.classes)}, or data.root=FOLDER of the data set that you mean"
        )
    if split != "test" and not manifest.labelled:
        raise DataError(
            f"{path} has clips without labels, which neither training nor validation can use. Fix: data.{split}=FILE of clips with "
            "labels; for predictions of these: evaluate.py evaluation.split=test data.test=FILE"
        )
    return manifest


def find_decoder(pipeline: PipelineConfig) -> str:
    """Choose the decoder of the loader's worker processes.

    Raises ConfigError with the fix if that decoder, or DALI where the configuration asks for it, is not installed.
    """
    try:
        if pipeline.loader == "dali":
            import_dali()
        return choose_decoder(pipeline.decoder)
    except (DaliError, ValueError) as error:
        raise ConfigError(str(error)) from error


def source_of(pipeline: PipelineConfig, manifest: Manifest, device: torch.device, retry_s: float) -> ClipSource:
    """Build the clip source of a manifest; `retry_s`: data.retry_s."""
    decoder = find_decoder(pipeline)
    if pipeline.loader == "dali":
        # Probes what DALI can decode, which takes a moment: now, and not while the first batch is due.
        choose_feed(manifest.path, device)
    return ClipSource(manifest.path, decoder, retry_s)


def augmentation_of(model: ModelConfig, data: DataConfig, pipeline: PipelineConfig) -> Augmentation:
    """Derive the augmentation of training clips, which is part of the recipe."""
    return Augmentation(
        num_frames=model.num_frames,
        size=pipeline.size,
        sampling=pipeline.sampling,
        crop_scales=tuple(pipeline.crop_scales),
        flip=pipeline.flip,
        mirrored_words=_pairs(data) if pipeline.flip == "relabel" else (),
        stream=stream_sampling_of(pipeline),
        modality=model.modality,
    )


def _pairs(data: DataConfig) -> tuple[tuple[str, str], ...]:
    return tuple((one.lower(), other.lower()) for one, other in data.mirrored_words)


def check_manifests(training: Manifest, validation: Manifest, augmentation: Augmentation) -> None:
    """Raise ConfigError, naming a class, if the splits have different classes or mirrored clips would get a wrong label.

    Raises DataError for clips of another modality.
    """
    for manifest in (training, validation):
        check_modality(manifest, augmentation.modality)
    if training.classes != validation.classes:
        difference = first_difference(validation.classes, str(validation.path), training.classes, str(training.path))
        raise ConfigError(
            f"data.train and data.val have different classes: {difference}. Fix: prepare both splits with one command"
        )
    if augmentation.flip == "off":
        return
    try:
        check_flip(augmentation.flip, training.classes, augmentation.mirrored_words)
    except ValueError as error:
        raise ConfigError(f"pipeline.flip={augmentation.flip}: {error}") from error


def check_modality(manifest: Manifest, modality: str) -> None:
    """Raise DataError unless all clips of the manifest have this modality."""
    others = manifest.modalities() - {modality}
    if others:
        fix = "FOLDER of flow (prepare.py flow)" if modality == FLOW else "FOLDER of videos or frames"
        fix = f"data.root={fix}, or model.modality={min(others)}"
        if modality in manifest.modalities():
            fix = "prepare frames and optical flow into a folder each"
        raise DataError(
            f"{manifest.path} has clips of {' and '.join(sorted(others))}, and model.modality={modality}. Fix: {fix}"
        )


def describe_mirror(training: Manifest, augmentation: Augmentation) -> list[str]:
    """Return a line that names classes for which the flip is doubtful, if there are any."""
    alone = find_mirror(training.classes, augmentation.mirrored_words).alone if augmentation.flip != "off" else []
    if not alone:
        return []
    more = f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
    return [
        f"warning    pipeline.flip={augmentation.flip} mirrors clips of {alone[0]!r}{more}, whose name has a direction; no class "
        "is its mirror image. Fix, if mirroring makes it another class: pipeline.flip=off"
    ]


def evaluation_clips_of(source: ClipSource, protocol: EvalProtocol, data: DataConfig) -> EvaluationClips:
    """Build the evaluation dataset. Raises DataError if the network is for clips of another modality."""
    check_modality(source.manifest, protocol.modality)
    return EvaluationClips(source, protocol, _pairs(data))


def protocol_of(model: ModelConfig, pipeline: PipelineConfig, evaluation: EvaluationConfig) -> EvalProtocol:
    """Derive the evaluation protocol. It is not part of the recipe, so any run can be evaluated by any protocol."""
    return EvalProtocol(
        num_frames=model.num_frames,
        size=pipeline.size,
        clips=_validation_rule(pipeline.sampling) if evaluation.clips == "validation" else evaluation.clips,
        crops=evaluation.crops,
        full_resolution=evaluation.full_resolution,
        portrait_bug=evaluation.portrait_bug,
        modality=model.modality,
    )


def _validation_rule(sampling: str) -> str:
    """Return the temporal view of a run's own evaluation. Stream sampling has none: its clips are evaluated as others are."""
    return "uniform_validation" if sampling == "stream" else f"{sampling}_validation"


def make_loader(
    pipeline: PipelineConfig,
    dataset: TrainingClips | EvaluationClips,
    backend: Backend,
    warn: Callable[[str], None] = warnings.warn,
) -> Loader:
    """Build the loader of a dataset, for this rank's device. `warn`: as in ClipLoader."""
    if pipeline.loader == "dali":
        threads = dali_threads(pipeline, backend.topology)
        return DaliLoader(dataset, pipeline.workers, pipeline.prefetch, backend.device, threads, warn)
    on_gpu = backend.device.type == "cuda"
    return ClipLoader(dataset, pipeline.workers, pipeline.prefetch, pin_memory=on_gpu, warn=warn)


def describe_input(pipeline: PipelineConfig, source: ClipSource, backend: Backend) -> str:
    """Describe decoder, threads and workers in one line."""
    workers = f"{pipeline.workers} workers a process"
    if pipeline.loader == "torch":
        return f"{_describe_decoder(source)} in {workers}"
    feed = describe(choose_feed(source.manifest_path, backend.device), backend.device, source.decoder)
    return f"{feed}; {dali_threads(pipeline, backend.topology)} threads and {workers}"


def _describe_decoder(source: ClipSource) -> str:
    fast, slow, unknown = source.manifest.fast_seek()
    if source.decoder == "pyav" or slow + unknown == 0:
        return f"decoder {source.decoder}"
    line = f"decoder {source.decoder} for {fast} of {fast + slow + unknown} videos, pyav for the others"
    if unknown == 0:
        return line
    fix = "Fix: run the prepare.py command of the data set again, where torchcodec is installed"
    return f"{line} ({unknown} are not known to decode right by {source.decoder}. {fix}; runs resume with the new manifests)"


def dali_threads(pipeline: PipelineConfig, topology: Topology) -> int:
    """Return the configured number of DALI threads, or half of the rank's cores: workers and step need the others."""
    return pipeline.dali_threads or max(1, int(cores_of_rank(topology) / 2))


def cores_of_rank(topology: Topology) -> float:
    """Return the cores that the launcher bound this rank to (Slurm: --cpus-per-task), else its share of the node's."""
    mine, all_cores = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    return mine / topology.local_size if mine == all_cores else mine
