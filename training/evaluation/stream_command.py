"""evaluation=stream of evaluate.py: a past-only run on a continuous stream, and early recognition beside other runs."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from distributed.backends.base import Backend
from pipelines.loading.clips import EvaluationClips
from pipelines.manifest import Manifest
from pipelines.stream.continuous import BEGINNINGS_PERCENT
from pipelines.stream.eval_views import EvalProtocol
from runtime.atomic_write import write_text
from training.build.data import Loader, evaluation_clips_of, make_loader, protocol_of, source_of
from training.build.normalise import Normaliser
from training.config.schema import Config
from training.errors import ConfigError
from training.report.html import write_report
from training.report.stream import as_text, early_table, stream_table
from training.runs.run_folder import RunFolder
from tsm.networks import TemporalNetwork
from tsm.streaming import StreamingNetwork, streaming_network

from .beginnings import evaluate_beginnings
from .continuous import StreamAnswers, evaluate_stream, frame_counts
from .stream_record import Record, clip_curve, stream_rows

STREAM = "stream"
"""The value of evaluation.clips."""


@dataclass(frozen=True)
class Subject:
    """A network to evaluate, with the configuration of its run."""

    source: str
    step: int
    config: Config
    network: TemporalNetwork


def streamable(network: TemporalNetwork) -> StreamingNetwork:
    """Return the streaming form of a network. Raises ConfigError for one that needs later frames."""
    try:
        return streaming_network(network)
    except ValueError as error:
        raise ConfigError(f"evaluation=stream: {error}") from error


def evaluate_on_stream(
    own: Subject, beside: list[Subject], manifest: Manifest, backend: Backend, progress: Callable[[int], None]
) -> tuple[Record, StreamAnswers]:
    """Evaluate `own` on the stream, and early recognition of it and of `beside`; collective.

    Returns what the record says of both, and the answers.
    """
    config = own.config

    def data_of(subject: Subject, protocol: EvalProtocol) -> tuple[EvaluationClips, Loader]:
        # The torch loader for all: DALI's pipelines have a fixed number of frames, and pixels of their own.
        pipeline = replace(config.pipeline, loader="torch")
        clips = evaluation_clips_of(
            source_of(pipeline, manifest, backend.device, config.data.retry_s), protocol, config.data
        )
        return clips, make_loader(pipeline, clips, backend)

    label_N = torch.from_numpy(manifest.labels().astype("int64"))
    protocol = protocol_of(config.model, config.pipeline, config.evaluation)
    normalise = Normaliser(backend.device, config.numerics, config.model.modality)
    answers = evaluate_stream(
        streamable(own.network), normalise, *data_of(own, protocol), backend, config.evaluation, progress
    )
    curves = []
    for subject in (own, *beside):
        theirs = subject.config
        rule = "dense" if theirs.pipeline.sampling == "dense" else "uniform"
        protocol = EvalProtocol(theirs.model.num_frames, theirs.pipeline.size, f"{rule}_beginnings")
        predicted_NV = evaluate_beginnings(
            subject.network,
            Normaliser(backend.device, theirs.numerics, theirs.model.modality),
            *data_of(subject, protocol),
            backend,
            config.evaluation,
            progress,
        )
        curves.append(clip_curve(subject.source, subject.step, theirs.model, predicted_NV, label_N, answers.seen_N))
    record = {
        "clips": int(answers.seen_N.sum()),
        "missing": int((~answers.seen_N).sum()),
        "manifest": manifest.digest,
        "stream": stream_rows(answers, label_N, frame_counts(manifest), config.evaluation.distances),
        "early": {"seen_percent": list(BEGINNINGS_PERCENT), "curves": curves},
    }
    return record, answers


def print_stream(record: Record, notes: list[str], answers: StreamAnswers) -> None:
    """Print the result line, both tables, the JSON line and the missing clips."""
    missing = f"  MISSING {record['missing']}" if record["missing"] else ""
    line = f"{record['source']} step {record['step']}  {record['protocol']}  ({record['clips']} clips, caches never reset){missing}"
    print("  ".join([line, *filter(None, notes)]), flush=True)
    print(as_text(*stream_table(record)), flush=True)
    print(as_text(*early_table(record)), flush=True)
    print(json.dumps(record), flush=True)
    for each in answers.missing:
        print(f"missing: {each.reason}", flush=True)


def save_stream(path: Path, record: dict[str, Any]) -> None:
    """Write the record to the run folder, and the report again, with its figure. Replaces an earlier one."""
    path.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(path)
    write_text(folder.stream, json.dumps(record, indent=1) + "\n")
    print(f"saved: {folder.stream}", flush=True)
    # Weights of a file have no run to report.
    if folder.config.exists():
        write_report(folder.path)
        print(f"saved: {folder.report}", flush=True)
