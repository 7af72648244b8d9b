"""Find out which of a manifest's codecs DALI decodes on this machine, and choose its input accordingly."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from pipelines.errors import BadClip
from pipelines.manifest import JPEG_FRAMES, Manifest

from .dali_batches import FRAMES, IMAGES, VIDEOS, EncodedSource
from .dali_graph import error_reason, import_dali, make_pipeline, samples_of

# Clips to try per codec before DALI counts as unable to decode it.
_ROWS_TRIED = 5


@dataclass(frozen=True)
class Feed:
    """The input to DALI: VIDEOS or IMAGES of `codecs`, while the host decodes the other clips; or FRAMES decoded on the host,
    if DALI decodes none of the manifest's codecs."""

    kind: str
    codecs: frozenset[str]
    others: dict[str, str]
    """Codecs that the host decodes, with the reason."""


@cache
def choose_feed(manifest_path: Path, device: torch.device) -> Feed:
    """Choose DALI's input by letting it decode a clip of each codec in the manifest on this device.

    The codecs that DALI decodes depend on its version and, on GPUs, on the chip. Raises DaliError if DALI does not load.
    """
    import_dali()
    manifest = Manifest.open(manifest_path)
    counts = manifest.codecs()
    reasons = {codec: _why_not(manifest, codec, device) for codec in counts}
    others = {codec: reason for codec, reason in reasons.items() if reason is not None}
    known = frozenset(counts) - frozenset(others)
    if not known:
        return Feed(FRAMES, frozenset(counts), others)
    images = known & {JPEG_FRAMES}
    videos = known - images
    more_images = sum(counts[codec] for codec in images) > sum(counts[codec] for codec in videos)
    chosen, rest = (images, videos) if more_images else (videos, images)
    others |= dict.fromkeys(rest, "one graph decodes either videos or images, and there are fewer of these")
    return Feed(IMAGES if more_images else VIDEOS, chosen, others)


def describe(feed: Feed, device: torch.device, decoder: str) -> str:
    """Describe the feed in one line for the log."""
    dali = f"DALI {import_dali().__version__}"
    why = "; ".join(f"{codec} ({reason})" for codec, reason in feed.others.items())
    if feed.kind == FRAMES:
        return (
            f"{dali} decodes none of these codecs on {device.type}: {why}. {decoder} decodes on the host, DALI augments. "
            "Other versions decode others, and prepare.py transcode can write a supported codec"
        )
    line = f"{dali} decodes {', '.join(sorted(feed.codecs))} on {device.type}"
    return f"{line}; on the host, by {decoder}: {why}" if why else line


def _why_not(manifest: Manifest, codec: str, device: torch.device) -> str | None:
    """Find the reason why DALI cannot decode a codec; None if it can."""
    kind = IMAGES if codec == JPEG_FRAMES else VIDEOS
    source = EncodedSource(manifest.path, "", kind, frozenset([codec]))
    reason = "no clip of it could be read"
    for index in manifest.rows_of(codec, _ROWS_TRIED):
        try:
            clip = source.first_frame(manifest.row(index))
        except BadClip:
            continue
        samples = samples_of(kind, [clip], [clip.parts])
        try:
            # The pipeline calls the lambda only here.
            make_pipeline(kind, device, 1, 1, lambda: samples).run()  # noqa: B023
        except RuntimeError as error:
            reason = error_reason(error)
            continue
        return None
    return reason
