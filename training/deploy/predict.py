"""Predict the classes of videos: scanned as for a manifest, then decoded and evaluated as evaluate.py does it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from pipelines.errors import BadClip
from pipelines.loading.clips import EvaluationClips
from pipelines.manifest import UNLABELLED, Manifest, write_manifest
from pipelines.prepare.scan.scan_journal import Scanned
from pipelines.prepare.scan.write_manifests import row_of, scan_each
from pipelines.stream.frame_sampling import EVALUATION_RULES
from training.build.data import evaluation_clips_of, make_loader, source_of
from training.errors import ConfigError
from training.evaluation.evaluate import Evaluation, evaluate
from training.evaluation.explain import explain_clips
from training.report.explain_page import write_explain_page

from .load import TrainedRun, require_rgb

# Videos that are scanned before the first of them is predicted.
_SCANNED_AT_ONCE = 1024


@dataclass(frozen=True)
class Prediction:
    """What a network says about a video."""

    video: str
    class_name: str
    """The class with the highest score."""
    scores: dict[str, float]
    """Softmax of the logits by class, the highest first."""
    logit_K: Tensor
    """Mean over the views of the protocol, in the order of the run's classes; on the CPU."""


@dataclass(frozen=True)
class Refused:
    """A video that cannot be used, with the reason that prepare.py would give for leaving it out."""

    video: str
    reason: str


class Predictor:
    """Predicts the classes of videos with a trained run."""

    def __init__(self, run: TrainedRun) -> None:
        """Raise ConfigError if the protocol is not one for single videos, or the network is not for RGB frames."""
        require_rgb(run.name, run.config.model.modality)
        clips = run.config.evaluation.clips
        if clips not in ("validation", *EVALUATION_RULES):
            raise ConfigError(f"evaluation.clips={clips} is no protocol for single videos. Fix: evaluation=validation")
        self.run = run

    def __call__(self, video: str | Path) -> Prediction:
        """Predict one video: a file, or a folder with a JPEG file per frame. Raises BadClip if it cannot be used."""
        (found,) = self.predict([Path(video)])
        if isinstance(found, Refused):
            raise BadClip(found.reason)
        return found

    def predict(self, videos: Sequence[Path], processes: int = 0) -> Iterator[Prediction | Refused]:
        """Predict many videos, in their order.

        `processes`: worker processes that scan, so that a video that crashes its decoder is refused; 0: scan and decode in
        this process. Otherwise pipeline.workers decode, and `start_worker_server` must have been called. Batches are those of
        an evaluation of the same videos in the same order, if none is refused.
        """
        run = self.run
        clips_per_batch = max(1, run.config.evaluation.batch // run.protocol.views)
        at_once = max(1, _SCANNED_AT_ONCE // clips_per_batch) * clips_per_batch
        for first in range(0, len(videos), at_once):
            yield from self._predict(videos[first : first + at_once], processes)

    def explain(self, videos: Sequence[Path], page: Path) -> None:
        """Write a page that shows videos that were predicted, with the logits for reversed and shuffled frames."""
        run, shown = self.run, []
        with TemporaryDirectory(prefix="tsm-predict-") as folder:
            good = [each for each in scan_videos(videos, 0).values() if each.facts is not None]
            if good:
                clips, settings = clips_of(run, good, Path(folder)), run.config.evaluation
                explained = explain_clips(run.network, run.normaliser, clips, range(len(good)), run.device, settings)
                shown = [replace(each, true_class=None) for each in explained]
        title, step = f"{run.name}: frames in order, reversed, shuffled", f"step {run.step}  {run.protocol.name}"
        write_explain_page(page, title, step, shown, run.classes)

    def _predict(self, videos: Sequence[Path], processes: int) -> Iterator[Prediction | Refused]:
        found = scan_videos(videos, processes)
        refused = {video: each.reason for video, each in found.items() if each.facts is None}
        good = [video for video in videos if video not in refused]
        logit_of = {}
        if good:
            with TemporaryDirectory(prefix="tsm-predict-") as folder:
                clips = clips_of(self.run, [found[video] for video in good], Path(folder))
                evaluation = self._evaluate(clips, self.run.config.pipeline.workers if processes else 0)
            refused |= {good[record.row]: record.reason for record in evaluation.missing}
            logit_of = dict(zip(good, evaluation.clip_logits.logit_NK.cpu(), strict=True))
        for video in videos:
            if video in refused:
                yield Refused(str(video), refused[video])
            else:
                yield self._prediction(str(video), logit_of[video])

    def _evaluate(self, clips: EvaluationClips, workers: int) -> Evaluation:
        run, settings = self.run, self.run.config.evaluation
        # An evaluation fills its last batch with padding. One video must not cost a whole batch.
        settings = replace(settings, batch=min(settings.batch, len(clips.source.manifest) * clips.protocol.views))
        loader = make_loader(replace(run.config.pipeline, workers=workers), clips, run.backend)
        return evaluate(run.network, run.normaliser, clips, loader, run.backend, settings)

    def _prediction(self, video: str, logit_K: Tensor) -> Prediction:
        score_K = logit_K.softmax(0)
        labels = score_K.argsort(descending=True, stable=True).tolist()
        scores = {self.run.classes[label]: float(score_K[label]) for label in labels}
        # Not the first of the scores: two logits that differ can have the same score.
        return Prediction(video, self.run.classes[int(logit_K.argmax())], scores, logit_K)


def scan_videos(videos: Sequence[Path], processes: int) -> dict[Path, Scanned]:
    """Decode each video once, from end to end, by the rules of prepare.py."""
    tasks = [(Path(), str(video), None) for video in dict.fromkeys(videos)]
    return {Path(scanned.path): scanned for scanned in scan_each(tasks, min(processes, len(tasks)))}


def clips_of(run: TrainedRun, scanned: Sequence[Scanned], folder: Path) -> EvaluationClips:
    """Return the evaluation clips of good videos, in their order, by a manifest that is written into `folder`."""
    rows = [row_of(replace(each, path=str(Path(each.path).absolute())), UNLABELLED) for each in scanned]
    manifest = folder / "predict.arrow"
    write_manifest(manifest, rows, run.classes)
    config = run.config
    source = source_of(config.pipeline, Manifest.open(manifest), run.device, config.data.retry_s)
    return evaluation_clips_of(source, run.protocol, config.data)
