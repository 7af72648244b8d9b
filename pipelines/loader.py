"""Former name of pipelines.loading.clips and pipelines.loading.worker_loader, for programs that import it from outside."""

from pipelines.loading.clips import ClipSource, EvaluationClips, TrainingClips
from pipelines.loading.worker_loader import ClipLoader

__all__ = ["ClipLoader", "ClipSource", "EvaluationClips", "TrainingClips"]
