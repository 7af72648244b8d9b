"""Clips stored as a folder with one JPEG file per frame, as in the official TSM code and mmaction2."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import BadClip, MissingClip
from pipelines.jpeg_clips import JPEG_COLOURS, JPEG_FLOW, JPEG_FRAMES
from pipelines.manifest import ManifestRow, image_file

from .scan_clip import ClipFacts, check_regular

_FRAME_NAME = re.compile(r"(?P<prefix>.*?)(?P<digits>\d+)(?P<suffix>\.jpe?g)", re.IGNORECASE)


@dataclass(frozen=True)
class FrameSeries:
    """The frames of one folder: files `pattern % number` for `count` numbers, from `first`."""

    pattern: str
    first: int
    count: int


def find_frames(folder: Path) -> FrameSeries:
    """Find the frames in a folder by their names.

    Raises BadClip when there is none, one is missing, or two series are mixed. Files without a JPEG suffix and optical flow
    (`flow_x_00001.jpg`) next to the frames are ignored.
    """
    names = _frame_names(folder)
    if not names:
        raise BadClip(f"{folder}: no JPEG file whose name ends in a number")
    matches = [match for match in map(_FRAME_NAME.fullmatch, names) if match]
    matches.sort(key=lambda match: int(match["digits"]))
    first = matches[0]
    pattern = first["prefix"].replace("%", "%%") + number_format(first["digits"]) + first["suffix"].replace("%", "%%")
    start = int(first["digits"])
    if start > 1:
        raise BadClip(f"{folder}: frame 1 is missing: the first file is {first.string}, and numbers start at 0 or 1")
    for number, match in enumerate(matches, start):
        if int(match["digits"]) > number:
            raise BadClip(f"{folder}: frame {number} is missing: there is no {pattern % number}")
        if match.string != pattern % number:
            raise BadClip(
                f"{folder}: found {match.string} where {pattern % number} was expected: two series of frames?"
            )
    return FrameSeries(pattern, start, len(matches))


def stat_frames(folder: Path) -> tuple[int, int]:
    """Return (bytes of all frames, newest mtime in ns of the folder or a frame): a cheap test for "unchanged".

    Raises BadClip when a frame is not a regular file.
    """
    return stat_files(folder, _frame_names(folder))


def stat_files(folder: Path, names: list[str]) -> tuple[int, int]:
    """Return (bytes of these files, newest mtime in ns of the folder or one of them), as `stat_frames` does."""
    size, newest_ns = 0, os.stat(folder).st_mtime_ns
    for name in names:
        status = os.stat(folder / name)
        check_regular(folder / name, status.st_mode)
        size += status.st_size
        newest_ns = max(newest_ns, status.st_mtime_ns)
    return size, newest_ns


def scan_frames(folder: str | Path) -> tuple[FrameSeries, ClipFacts]:
    """Decode every frame of a folder. Raises BadClip when one does not decode, or two differ in size."""
    folder = Path(folder)
    series = find_frames(folder)
    return series, scan_series(folder, series, JPEG_FRAMES)


def scan_series(folder: Path, series: FrameSeries, codec: str) -> ClipFacts:
    """Decode every image of a series, as `scan_frames` does."""
    # Imported here because it loads torch, which scanning videos does not need.
    from pipelines.decoding.jpeg import decode_jpeg_bytes

    row = row_of_series(series, codec)
    length, height, width = 0, 0, 0
    for image in range(row.num_images):
        path = image_file(folder / row.path, row, image)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise BadClip(f"{path}: {error.strerror}") from error
        image_CHW = decode_jpeg_bytes(str(path), content, grey=codec == JPEG_FLOW)
        length += len(content)
        if image == 0:
            height, width = image_CHW.shape[1:]
        if image_CHW.shape[1:] != (height, width):
            sizes = f"{image_CHW.shape[2]}x{image_CHW.shape[1]}, the first frame {width}x{height}"
            raise BadClip(f"{folder}: {path.name} is {sizes}")
    return ClipFacts(length, series.count, codec, width, height, 0, *JPEG_COLOURS)


def row_of_series(series: FrameSeries, codec: str) -> ManifestRow:
    """Return a row that has only what names the files of a series."""
    return ManifestRow(series.pattern, series.first, 0, 0, series.count, codec, 0, 0, 0)


def number_format(digits: str) -> str:
    """Return the printf format of numbers that are written like this one."""
    return f"%0{len(digits)}d" if len(digits) > 1 else "%d"


def _frame_names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries]
    except FileNotFoundError:
        raise MissingClip(f"{folder}: no such folder") from None
    except OSError as error:
        raise BadClip(f"{folder}: {error.strerror}") from error
    return [name for name in names if is_frame_name(name)]


def is_frame_name(name: str) -> bool:
    """Tell whether a file is a frame of a clip, by its name: a JPEG suffix after a number, and no optical flow."""
    return _FRAME_NAME.fullmatch(name) is not None and not name.startswith(("flow_", "."))
