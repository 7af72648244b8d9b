"""Annotated clips of which the optical flow is on the disk, and not the video."""

from dataclasses import replace

from pipelines.jpeg_clips import JPEG_FLOW, JPEG_FLOW_RG

from .base import Annotations, Clip

FLOW_IMAGES = {"xy": JPEG_FLOW, "red-green": JPEG_FLOW_RG}
"""Codecs of optical flow by their names on the command line."""


def as_flow(annotations: Annotations, images: str) -> Annotations:
    """Return the annotations of the same clips with folders of optical flow; `images`: one of FLOW_IMAGES."""
    splits = {split: [_flow_of(clip) for clip in clips] for split, clips in annotations.splits.items()}
    return replace(annotations, splits=splits, images=FLOW_IMAGES[images])


def _flow_of(clip: Clip) -> Clip:
    """Return a clip with its folder of flow: without a video's suffix, and of six digits for a number that has no folder.

    The folders of Something-Something v1's flow have six digits, as the official TSM code reads them; the lists have none.
    """
    folder = clip.path if clip.path.is_dir() else clip.path.with_suffix("")
    if not folder.is_dir() and folder.name.isdecimal():
        six_digits = folder.with_name(f"{int(folder.name):06d}")
        folder = six_digits if six_digits.is_dir() else folder
    return replace(clip, path=folder)
