"""Compute the optical flow of a data set, with the names, labels and order of its clips."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from pipelines.clip_names import clip_name
from pipelines.manifest import Manifest, ManifestRow
from pipelines.prepare.errors import DataSetError
from pipelines.prepare.repack.clip_task import ClipTask
from pipelines.prepare.repack.job_array import Part
from pipelines.prepare.repack.open_manifests import open_manifests, require_other_folder
from pipelines.prepare.repack.remake import NewForm, Remade, remake
from pipelines.prepare.repack.transcode import numbered
from pipelines.stream.modality import RGB

from .flow_clip import SHORT_SIDE, FlowTask
from .optical_flow import require_method


def compute_flow(root: Path, target: Path, method: str, tar: bool, workers: int, part: Part, max_bad: float) -> Remade:
    """Compute the flow of this part's clips of the data set in `root`; once all clips are done, write the manifests.

    `tar`: write a tar file for each clip in place of a folder of images.
    Raises DataSetError without OpenCV, for a target that cannot be written, for clips whose flow would share a folder, and,
    without writing a manifest, when a larger fraction of a split than `max_bad` cannot be decoded or has only one frame.
    """
    require_other_folder(root, target)
    require_method(method)
    manifests = open_manifests(root)
    if any(manifest.modalities() != {RGB} for manifest in manifests.values()):
        raise DataSetError(
            f"{root}: its clips are optical flow. Fix: give the folder of the RGB clips' manifests with --root"
        )
    stems = {
        name: [clip_stem(name, manifest.row(number), number) for number in range(len(manifest))]
        for name, manifest in manifests.items()
    }
    _refuse_shared_folders(stems)

    def tasks(name: str, manifest: Manifest) -> Sequence[ClipTask]:
        return [FlowTask(manifest.path, number, target, stem, method, tar) for number, stem in enumerate(stems[name])]

    options = {"method": method, "tar": tar, "short_side": SHORT_SIDE}
    form = NewForm("flow", "computing the flow of", ".flow", options, tasks)
    return remake(form, manifests, target, workers, part, max_bad)


def clip_stem(split: str, row: ManifestRow, number: int) -> str:
    """Return where the flow of a clip is, below the new folder: by the clip's name, where it is known."""
    name = clip_name(row)
    # A clip outside of its manifest's folder has such parts.
    parts = [part for part in PurePosixPath(name).parts if part not in ("/", "..")]
    return "/".join(parts) if name else f"{split}/{numbered(number)}"


def _refuse_shared_folders(stems: dict[str, list[str]]) -> None:
    """Raise DataSetError if two clips would have one folder, or a clip's folder were within another's."""
    counts = Counter(stem for names in stems.values() for stem in names)
    for stem, count in counts.items():
        outer = [str(parent) for parent in PurePosixPath(stem).parents if str(parent) in counts]
        if count > 1 or outer or not stem:
            other = "another clip" if count > 1 else f"the clip {outer[0]}" if outer else "the data set"
            raise DataSetError(
                f"the flow of the clip {stem or '.'} would be in the folder of {other}. "
                "Fix: rename one of them so that clips differ in more than their suffix, and make the manifests again"
            )
