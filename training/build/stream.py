"""Build the settings of `pipeline.sampling=stream`, and check that the network can be trained with them."""

from pipelines.stream.burn_in import StreamSampling
from training.config.schema import ModelConfig, PipelineConfig
from training.errors import ConfigError


def stream_sampling_of(pipeline: PipelineConfig) -> StreamSampling | None:
    """Return the settings of stream sampling; None for clips by themselves."""
    if pipeline.sampling != "stream":
        return None
    return StreamSampling(pipeline.burn_in, tuple(pipeline.distances), pipeline.loss_from, pipeline.score_burn_in)


def check_stream(model: ModelConfig, pipeline: PipelineConfig) -> None:
    """Raise ConfigError if training with `pipeline.sampling=stream` is asked of a network or loader that cannot do it."""
    if pipeline.sampling != "stream":
        return
    looks_ahead = {
        "model.direction": (model.direction, "past", model.shift != "none" and model.direction != "past"),
        "model.temporal_pool": ("true", "false", model.temporal_pool),
        "model.non_local": ("true", "false", model.non_local),
    }
    for key, (value, fix, wrong) in looks_ahead.items():
        if wrong:
            raise ConfigError(
                f"pipeline.sampling=stream trains a network for live streams, and with {key}={value} a frame's logits depend on "
                f"later frames. Fix: {key}={fix}, or pipeline.sampling=uniform"
            )
    if pipeline.loader == "dali":
        raise ConfigError(
            "pipeline.sampling=stream joins frames of two clips, which the DALI loader does not do. Fix: pipeline.loader=torch"
        )
