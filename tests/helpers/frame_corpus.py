"""Make video files of many kinds with the ffmpeg program, and compare decoded frames with those that ffmpeg shows.

A file is an encoding (codec, GOPs, size) in a container, then perhaps cut by stream copy, turned or mirrored, or renamed.
"""

import random
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.decoding.decode import decode_clip
from pipelines.errors import BadClip
from pipelines.manifest import ManifestRow
from pipelines.prepare.scan.scan_clip import scan_clip

from .clips import with_matrix

FRAMES, WIDTH, HEIGHT = 40, 64, 48
MOST_LEVELS = 2.5
"""Allowed mean difference to ffmpeg's frame, whose swscale is of another version. Frames of the source differ by far more."""
_X264 = "scenecut=0:threads=1"
_MP4, _TIMED, _X26X = ("mp4", "mov"), ("mp4", "mov", "mkv"), ("mp4", "mov", "mkv", "ts", "flv", "avi")
_WAYS = ("whole", "whole", "seek after", "length only", "remuxed", "seek before")
_NAMES = ("mp4", "avi", "webm", "ts", "video", "")
_MATRICES = [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)] + [(0, b, c, 0) for b in (1, -1) for c in (1, -1)]


@dataclass(frozen=True)
class Encoding:
    """Options of the ffmpeg program, and the containers that take its stream."""

    name: str
    options: str
    containers: tuple[str, ...]
    size: tuple[int, int] = (WIDTH, HEIGHT)


ENCODINGS = [
    Encoding("h264 closed gops", f"-c:v libx264 -g 12 -bf 3 -x264-params {_X264}", _X26X),
    Encoding("h264 open gops", f"-c:v libx264 -g 10 -bf 3 -x264-params open-gop=1:b-pyramid=normal:{_X264}", _TIMED),
    Encoding("h264 no b-frames", f"-c:v libx264 -g 7 -bf 0 -x264-params {_X264}", _X26X),
    Encoding("h264 one gop", f"-c:v libx264 -g 250 -bf 2 -x264-params {_X264}", _X26X),
    Encoding("h264 scene cuts", "-c:v libx264 -preset fast -threads 1", _TIMED),
    Encoding("h264 intra refresh", f"-c:v libx264 -g 10 -bf 0 -x264-params intra-refresh=1:{_X264}", _TIMED),
    Encoding("h264 4:4:4 odd", f"-c:v libx264 -g 9 -pix_fmt yuv444p -x264-params {_X264}", _TIMED, (65, 47)),
    Encoding("h264 10 bits", f"-c:v libx264 -g 9 -pix_fmt yuv420p10le -x264-params {_X264}", _TIMED),
    Encoding(
        "h264 fragments", f"-c:v libx264 -g 8 -bf 2 -movflags frag_keyframe+empty_moov -x264-params {_X264}", _MP4
    ),
    Encoding("hevc default", "-c:v libx265 -x265-params keyint=10:pools=none:frame-threads=1", (*_TIMED, "ts")),
    Encoding("hevc closed", "-c:v libx265 -x265-params keyint=10:open-gop=0:pools=none:frame-threads=1", _TIMED),
    Encoding("hevc open, one gop", "-c:v libx265 -x265-params bframes=4:pools=none:frame-threads=1", _TIMED),
    Encoding("mpeg4 b-frames", "-c:v mpeg4 -q:v 3 -g 11 -bf 2", ("mp4", "mov", "mkv", "avi", "ts")),
    Encoding("mpeg4 odd", "-c:v mpeg4 -q:v 3 -g 11", ("mp4", "mkv", "avi"), (65, 47)),
    Encoding("mpeg2", "-c:v mpeg2video -q:v 3 -g 9 -bf 2", ("ts", "mkv", "mp4", "mpg")),
    Encoding("vp8", "-c:v libvpx -g 15 -b:v 400k -threads 1", ("webm", "mkv")),
    Encoding(
        "vp8 hidden frames", "-c:v libvpx -auto-alt-ref 1 -lag-in-frames 16 -b:v 400k -threads 1", ("webm", "mkv")
    ),
    Encoding("vp9", "-c:v libvpx-vp9 -g 15 -b:v 400k -cpu-used 8 -threads 1", ("webm", "mkv", "mp4")),
    Encoding("vp9 odd", "-c:v libvpx-vp9 -g 15 -b:v 400k -cpu-used 8 -threads 1", ("webm", "mp4"), (65, 47)),
    Encoding("av1", "-c:v libaom-av1 -g 12 -b:v 400k -cpu-used 8 -threads 1 -row-mt 0", ("mkv", "mp4", "webm")),
    Encoding("mjpeg", "-c:v mjpeg -q:v 3", ("mp4", "mov", "avi", "mkv")),
    Encoding("flv1", "-c:v flv -q:v 3 -g 9", ("flv",)),
    Encoding("wmv2", "-c:v wmv2 -q:v 3 -g 9", ("wmv", "avi")),
    Encoding("theora", "-c:v libtheora -q:v 8 -g 9", ("mkv", "ogv")),
]


@dataclass(frozen=True)
class Made:
    """A file of the corpus, and how it was made."""

    path: Path
    how: str


@dataclass
class Checked:
    """The result for one file."""

    how: str
    left_out: str = ""
    """The reason why the scan refuses it."""
    fast: bool = False
    """torchcodec decodes it."""
    decodes: int = 0
    wrong: str = ""


def write_corpus(folder: Path, seed: int, count: int) -> Iterator[Made]:
    """Write `count` files, the same kinds for the same seed. Encodes each kind once. Skips what ffmpeg cannot write."""
    dice, number = random.Random(seed), 0
    kinds = [(encoding, container) for encoding in ENCODINGS for container in encoding.containers]
    dice.shuffle(kinds)
    while number < count:
        encoding, container = kinds[number % len(kinds)]
        vfr = dice.random() < 0.2
        source = folder / f"{encoding.name} {vfr}.{container}".replace(" ", "_")
        if not source.exists() and not _encode(source, encoding, vfr, seed):
            kinds.remove((encoding, container))
            continue
        how = f"{encoding.name}, {container}{', variable rate' if vfr else ''}"
        path = folder / f"clip{number}.{container}"
        # FFmpeg 5.1 shows MJPEG and AV1 frames that an edit list discards; newer versions, as PyAV has, do not.
        shows_discarded = encoding.name in ("mjpeg", "av1") and container in _MP4
        how += _cut(source, path, dice, ways=_WAYS[:-1] if shows_discarded else _WAYS)
        if container in _MP4 and dice.random() < 0.4 and b"tkhd" in path.read_bytes():
            matrix = dice.choice(_MATRICES)
            with_matrix(path, matrix)
            how += f", matrix {matrix}"
        if dice.random() < 0.3:
            suffix = dice.choice(_NAMES)
            path = path.rename(folder / (f"clip{number}.{suffix}" if suffix else f"clip{number}"))
            how += f", named {path.name}"
        number += 1
        yield Made(path, how)


def _encode(path: Path, encoding: Encoding, vfr: bool, seed: int) -> bool:
    width, height = encoding.size
    rate = ["-vf", "setpts=(N+mod(N*N\\,5)*0.3+floor(N/7)*2)/25/TB", "-vsync", "vfr"] if vfr else []
    call = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r 25 -i -".split()
    pixels = "" if "-pix_fmt" in encoding.options or "mjpeg" in encoding.name else "-pix_fmt yuv420p"
    command = [*call, *rate, *pixels.split(), *encoding.options.split(), path]
    return ffmpeg(command, source_video(width, height, seed).tobytes()) is not None and path.stat().st_size > 0


def source_video(width: int, height: int, seed: int) -> NDArray[np.uint8]:
    """Return video_THWC in which no two frames are alike: the brightness jumps, and so does the place of a dark bar."""
    level_T = 50 + 37 * np.arange(FRAMES) % 151
    video_THWC = np.repeat(level_T[:, None, None, None], height, 1) + np.linspace(0, 40, width)[:, None]
    for number in range(FRAMES):
        at = (number * 11 + seed) % (width - 8)
        video_THWC[number, 8:-8, at : at + 8] -= 45
    return (video_THWC * (1.0, 1.0, 0.6)).astype(np.uint8)


def _cut(source: Path, path: Path, dice: random.Random, ways: tuple[str, ...]) -> str:
    """Copy the whole file, or a part of its stream, cut as people do."""
    way = dice.choice(ways)
    start, length = round(dice.uniform(0.1, 1.1), 2), round(dice.uniform(0.3, 1.0), 2)
    copy = ["-i", source, "-c", "copy"]
    commands = {
        "seek before": ["-ss", start, *copy, "-t", length],
        "seek after": [*copy, "-ss", start],
        "length only": [*copy, "-t", length],
        "remuxed": copy,
    }
    if way == "whole" or ffmpeg([*commands[way], path]) is None:
        shutil.copy(source, path)
        return ""
    return f", {way} {start} {length}"


def ffmpeg(arguments: list[object], stdin: bytes = b"") -> bytes | None:
    """Run ffmpeg; return its output, or None when it fails."""
    command = ["ffmpeg", "-v", "quiet", "-y", *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=120)
    return None if done.returncode else done.stdout


def check(made: Made, seed: int) -> Checked:
    """Scan a file, and compare what each decoder gives with what ffmpeg shows."""
    checked = Checked(made.how)
    try:
        row = ManifestRow(made.path.name, 0, label=0, **asdict(scan_clip(made.path)))
    except BadClip as error:
        checked.left_out = str(error).removeprefix(f"{made.path}: ")
        return checked
    checked.fast = bool(row.fast_seek)
    width, height = row.upright_size
    show = ["-map", "0:V:0", "-vsync", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = ffmpeg(["-i", made.path, *show]) or b""
    if len(raw) != row.num_frames * width * height * 3:
        shown = len(raw) / (width * height * 3)
        checked.wrong = f"the manifest says {row.num_frames} frames of {width}x{height}, ffmpeg shows {shown:.2f}"
        return checked
    expected_THWC = np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)
    every = list(range(row.num_frames))
    dice = random.Random(seed)
    eights = [sorted(dice.sample(every, min(8, len(every)))) for _ in range(8)]
    asks = {"pyav": [every, *eights[:2]]}
    if row.fast_seek:
        asks["torchcodec"] = [every, *([number] for number in every), *eights]
    for decoder, requests in asks.items():
        for frames in requests:
            checked.decodes += 1
            checked.wrong = checked.wrong or _compare(made.path.parent, decoder, row, frames, expected_THWC)
    return checked


def _compare(root: Path, decoder: str, row: ManifestRow, frames: list[int], expected_THWC: NDArray[np.uint8]) -> str:
    try:
        video_TCHW = decode_clip(decoder, root, row, np.array(frames))
    except BadClip as error:
        return f"{decoder}: {error}"
    found_THWC = video_TCHW.permute(0, 2, 3, 1).numpy().astype(np.int16)
    levels_T = np.abs(found_THWC - expected_THWC[frames]).mean((1, 2, 3))
    if levels_T.max() <= MOST_LEVELS:
        return ""
    place = int(levels_T.argmax())
    nearest = int(np.abs(found_THWC[place] - expected_THWC).mean((1, 2, 3)).argmin())
    return f"{decoder}: frame {frames[place]} is off by {levels_T[place]:.1f} levels, and looks like frame {nearest}"
