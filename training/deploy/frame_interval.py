"""The time from one frame of a network to its next on a stream: the frame distance of training, in seconds.

Training knows distances in frames. They become seconds by the frame rate of the training videos (`data.frame_rate`), or, where
that is not known, by the rate of the stream. stream.py, the model card and the page in web/ follow the same rule.
"""

from statistics import median
from typing import Any

from pipelines.stream.frame_sampling import DENSE_WINDOW
from training.config.schema import Config

# Where training fixed no distance: every second frame, as in the official online demo.
_USUAL_DISTANCE = 2


def frames_of(config: Config) -> dict[str, Any]:
    """Return how training chose frames, for the model card.

    `distances`: frames of the video from one to the next; None: not fixed, because uniform sampling divides each video into
    equal parts. `frame_rate`: of the training videos, and `interval_s` the seconds between two frames on a stream; None: not
    known.
    """
    interval_s, note = _trained(config)
    return {
        "num_frames": config.model.num_frames,
        "sampling": config.pipeline.sampling,
        "distances": _distances(config),
        "frame_rate": config.data.frame_rate,
        "interval_s": interval_s,
        "note": note,
    }


def trained_interval(config: Config, source_fps: float) -> tuple[float, str]:
    """Return the seconds between the network's frames on a source of this rate, and a note on their origin."""
    interval_s, note = _trained(config)
    if interval_s is None:
        interval_s = _distance(config) / source_fps
        note = f"{note}, here {source_fps:.4g} frames/s. If you know that rate: data.frame_rate=RATE"
    return interval_s, note


def _trained(config: Config) -> tuple[float | None, str]:
    """Return the interval, None if the rate of the training videos is not known, and the rule in words."""
    distance, rate = _distance(config), config.data.frame_rate
    distances = _distances(config)
    if distances is None:
        origin = "every second frame, since training on equal parts of a clip has no fixed distance"
    elif len(distances) == 1:
        origin = f"trained at a distance of {distance:g} frames"
    else:
        origin = (
            f"trained at distances of {min(distances)} to {max(distances)} frames, of which {distance:g} is the median"
        )
    if rate is None:
        return None, (
            f"{origin}; the training videos' frame rate is not known, or not the same in all, so that of the stream is taken"
        )
    return distance / rate, f"{origin}, at the training videos' {rate:g} frames/s"


def _distance(config: Config) -> float:
    return median(_distances(config) or [_USUAL_DISTANCE])


def _distances(config: Config) -> list[int] | None:
    if config.pipeline.sampling == "stream":
        return list(config.pipeline.distances)
    if config.pipeline.sampling == "dense":
        return [DENSE_WINDOW // config.model.num_frames]
    return None
