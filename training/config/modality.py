"""Check what a configuration asks of a flow network."""

from training.errors import ConfigError

from .schema import Config


def check_modality(config: Config) -> None:
    """Raise ConfigError if model.modality=flow comes with a setting that is defined for single frames only."""
    if config.model.modality == "rgb":
        return
    joins_clips = "joins frames of two clips, between which there is no flow"
    for_frames_only = (
        ("pipeline.sampling=stream", config.pipeline.sampling == "stream", joins_clips, "pipeline.sampling=uniform"),
        ("evaluation=stream", config.evaluation.clips == "stream", joins_clips, "evaluation=centre"),
        (
            "evaluation.explain",
            config.evaluation.explain > 0,
            "shows frames in other orders, and flow has none: each field belongs to two neighbouring frames",
            "evaluation.explain=0, or the RGB run",
        ),
    )
    for setting, wanted, why, fix in for_frames_only:
        if wanted:
            raise ConfigError(f"{setting} {why}; so not with model.modality=flow. Fix: {fix}")
