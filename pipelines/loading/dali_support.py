"""Find out what DALI can decode on this machine."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from pipelines.errors import BadClip
from pipelines.manifest import JPEG_FRAMES, Manifest

from .dali_batches import FRAMES, IMAGES, VIDEOS, EncodedSource
from .dali_graph import _reason, import_dali, make_pipeline, samples_of

_ROWS_TRIED = 5  # of each codec, before DALI is held not to know it


@dataclass(frozen=True)
class Feed:
    """What DALI is fed with: VIDEOS or IMAGES of these codecs, while clips of others are decoded to the end on the host; or, where
    it knows none of a manifest's codecs, FRAMES that the host has decoded."""

    kind: str
    codecs: frozenset[str]
    others: dict[str, str]
    """Codecs that the host decodes, and why."""


@cache
def choose_feed(manifest_path: Path, device: torch.device) -> Feed:
    """Find out what DALI can decode on this device by having it decode a clip of each codec that the manifest has.

    Which codecs those are depends on its version and, on GPUs, on the chip. Raises DaliError where DALI is not there.
    """
    import_dali()
    manifest = Manifest.open(manifest_path)
    counts = manifest.codecs()
    reasons = {codec: _why_not(manifest, codec, device) for codec in counts}
    others = {codec: reason for codec, reason in reasons.items() if reason is not None}
    known = frozenset(counts) - frozenset(others)
    if not known:
        return Feed(FRAMES, frozenset(counts), others)
    pictures = known & {JPEG_FRAMES}
    videos = known - pictures
    many_pictures = sum(counts[codec] for codec in pictures) > sum(counts[codec] for codec in videos)
    chosen, lesser = (pictures, videos) if many_pictures else (videos, pictures)
    others |= dict.fromkeys(lesser, "one graph decodes videos or pictures, and there are fewer of these")
    return Feed(IMAGES if many_pictures else VIDEOS, chosen, others)


def describe(feed: Feed, device: torch.device, decoder: str) -> str:
    """One line for the log."""
    dali = f"DALI {import_dali().__version__}"
    why = "; ".join(f"{codec} ({reason})" for codec, reason in feed.others.items())
    if feed.kind == FRAMES:
        return (
            f"{dali} knows none of these codecs on {device.type}: {why}. {decoder} decodes on the host, DALI augments. Other "
            "versions know others, and prepare.py transcode makes one that is known"
        )
    line = f"{dali} decodes {', '.join(sorted(feed.codecs))} on {device.type}"
    return f"{line}; on the host, by {decoder}: {why}" if why else line


def _why_not(manifest: Manifest, codec: str, device: torch.device) -> str | None:
    """Why DALI cannot decode a codec; None when it can."""
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
            make_pipeline(kind, device, 1, 1, lambda: samples).run()  # noqa: B023  (called here, and not later)
        except RuntimeError as error:
            reason = _reason(error)
            continue
        return None
    return reason
