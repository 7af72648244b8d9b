"""Optical flow stored as a folder of JPEG images per clip: the names that the official TSM code reads.

Of JPEG_FLOW two grey images per flow field, `flow_x_00001.jpg` and `flow_y_00001.jpg`, or `000001-x_00001.jpg` in a folder `000001`
(Something-Something v1). Of JPEG_FLOW_RG one colour image, named as a frame (Something-Something v2).
"""

import re
from pathlib import Path

from pipelines.errors import BadClip, MissingClip
from pipelines.jpeg_clips import COMPONENT, JPEG_FLOW
from pipelines.manifest import image_file

from .frame_folders import FrameSeries, find_frames, number_format, row_of_series, scan_series, stat_files, stat_frames
from .scan_clip import ClipFacts

_IMAGE_NAME = re.compile(r"(?P<prefix>(?:.*[-_])?)(?P<component>[xy])_(?P<digits>\d+)(?P<suffix>\.(?i:jpe?g))")


def find_flow(folder: Path, codec: str) -> FrameSeries:
    """Find the flow fields in a folder by the names of their images, which may stand beside the frames'.

    Raises BadClip when there is none, an x has no y or the other way round, a number is missing, or two series are mixed.
    """
    if codec != JPEG_FLOW:
        return find_frames(folder)
    matches = [match for match in map(_IMAGE_NAME.fullmatch, _names(folder)) if match]
    if not matches:
        raise BadClip(f"{folder}: no optical flow: no JPEG file with x or y and a number at the end of its name")
    first = min(matches, key=lambda match: (int(match["digits"]), match["component"], match.string))
    number = number_format(first["digits"])
    pattern = first["prefix"].replace("%", "%%") + f"{COMPONENT}_{number}" + first["suffix"]
    series = FrameSeries(pattern, int(first["digits"]), len({int(match["digits"]) for match in matches}))
    others = sorted(match.string for match in matches if not _is_of(match, first))
    if others:
        raise BadClip(f"{folder}: two series of optical flow: {first.string} and {others[0]}")
    if series.first > 1:
        raise BadClip(
            f"{folder}: flow field 1 is missing: the first file is {first.string}, and numbers start at 0 or 1"
        )
    _require_pairs(folder, series, {match.string for match in matches})
    return series


def _is_of(match: re.Match[str], first: re.Match[str]) -> bool:
    """Tell whether two images are of one series: only their components and numbers differ."""
    digits = number_format(first["digits"]) % int(match["digits"])
    return (match["prefix"], match["suffix"], match["digits"]) == (first["prefix"], first["suffix"], digits)


def _require_pairs(folder: Path, series: FrameSeries, names: set[str]) -> None:
    """Raise BadClip, which names a file, unless there is an x and a y for each number."""
    row = row_of_series(series, JPEG_FLOW)
    for index in range(series.count):
        pair = [image_file(folder / series.pattern, row, image).name for image in row.images_of(index)]
        absent = [name for name in pair if name not in names]
        if len(absent) == 2:
            raise BadClip(f"{folder}: flow field {series.first + index} is missing: there is no {pair[0]}")
        if absent:
            there = pair[1 - pair.index(absent[0])]
            raise BadClip(f"{folder}: {absent[0]} is missing, while {there} is there")


def stat_flow(folder: Path, codec: str) -> tuple[int, int]:
    """Return (bytes of all images, newest mtime in ns of the folder or an image), as `stat_frames` does."""
    if codec != JPEG_FLOW:
        return stat_frames(folder)
    return stat_files(folder, [name for name in _names(folder) if _IMAGE_NAME.fullmatch(name)])


def scan_flow(folder: Path, codec: str) -> tuple[FrameSeries, ClipFacts]:
    """Decode every image of a folder. Raises BadClip when one does not decode, or two differ in size."""
    series = find_flow(folder, codec)
    return series, scan_series(folder, series, codec)


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        raise MissingClip(f"{folder}: no such folder") from None
    except OSError as error:
        raise BadClip(f"{folder}: {error.strerror}") from error
