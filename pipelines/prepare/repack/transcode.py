"""Transcode a data set's clips: smaller images, key frames close together, the same frames."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pipelines.manifest import Manifest
from pipelines.prepare.errors import DataSetError
from pipelines.stream.modality import FLOW

from .clip_task import ClipTask
from .encoders import ENCODERS
from .job_array import Part
from .open_manifests import open_manifests, require_other_folder
from .remake import NewForm, Remade, remake
from .transcode_clip import Settings, TranscodeTask

_CLIPS_IN_FOLDER = 1000


def check_settings(settings: Settings) -> None:
    """Raise DataSetError for an option that the encoder does not support."""
    encoder = ENCODERS[settings.codec]
    for option, value, least, most in (
        ("--short-side", settings.short_side, max(16, encoder.least_side), 4096),
        ("--gop", settings.gop, 1, 1000),
        ("--quality", settings.quality, 1, encoder.worst),
    ):
        if not least <= value <= most:
            raise DataSetError(f"{option} is {value}. Fix: give {least} to {most} with --codec {settings.codec}")


def transcode(root: Path, target: Path, settings: Settings, workers: int, part: Part, max_bad: float) -> Remade:
    """Transcode this part's clips of the data set in `root`; once all clips are done, write the manifests.

    Raises DataSetError for a target that cannot be written, and, without writing a manifest, when a larger fraction of a split
    than `max_bad` cannot be decoded, cannot be encoded, or differs too much from the source.
    """
    require_other_folder(root, target)
    check_settings(settings)
    manifests = open_manifests(root)
    _refuse_flow(manifests)

    def tasks(name: str, manifest: Manifest) -> Sequence[ClipTask]:
        return [
            TranscodeTask(manifest.path, number, target, f"{name}/{numbered(number)}", settings)
            for number in range(len(manifest))
        ]

    form = NewForm("transcode", "encoding", ".transcoding", asdict(settings), tasks)
    return remake(form, manifests, target, workers, part, max_bad)


def _refuse_flow(manifests: dict[str, Manifest]) -> None:
    """Raise DataSetError for clips of optical flow, whose values must not change as those of an image may."""
    for manifest in manifests.values():
        if FLOW in manifest.modalities():
            raise DataSetError(
                f"{manifest.path}: its clips are optical flow, which is not transcoded. "
                "Fix: transcode the frames, and compute the flow of the result"
            )


def numbered(number: int) -> str:
    """Return a clip's path by its row number: a thousand per folder."""
    return f"{number // _CLIPS_IN_FOLDER:06d}/{number:09d}"
