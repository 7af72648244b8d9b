"""Small clips for tests: distinguishable frames, in files of any codec."""

import math
import multiprocessing
import struct
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from pipelines.manifest import Manifest, ManifestRow, write_manifest
from pipelines.prepare.scan.scan_clip import scan_clip
from pipelines.prepare.shapes.drawing import encode_clip

Video = NDArray[np.uint8]


def plain_video(frames: int = 4, height: int = 32, width: int = 48, level: int = 90) -> Video:
    """Return a grey video_THWC that gets a little brighter in each frame, so that its file is small."""
    level_T111 = (level + 10 * np.arange(frames))[:, None, None, None]
    return np.ascontiguousarray(np.broadcast_to(level_T111, (frames, height, width, 3)).astype(np.uint8))


def smooth_video(frames: int = 16, height: int = 48, width: int = 64, seed: int = 0) -> Video:
    """Return a video_THWC of slowly changing colours that every codec preserves well; all frames differ."""
    rng = np.random.default_rng(seed)
    y_H1, x_1W = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None]
    phase_T11C = 0.15 * np.arange(frames)[:, None, None, None] + rng.uniform(0, 6, 3)
    wave_THWC = np.sin(phase_T11C + 3 * x_1W[..., None] + 2 * y_H1[..., None])
    return np.rint(128 + 90 * wave_THWC).astype(np.uint8)


def write_video(
    path: Path,
    video_THWC: Video,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    colours: tuple[int, int] | None = None,
) -> Path:
    """Write a video with PyAV's encoders; the file's suffix determines the container.

    `colours`: FFmpeg's numbers of the colour space and range that the stream claims; the pixels are the same for all.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=Fraction(24))
        stream.height, stream.width = video_THWC.shape[1:3]
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1
        stream.options = options or {}
        if colours is not None:
            stream.codec_context.colorspace, stream.codec_context.color_range = colours
        for image_HWC in video_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image_HWC, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def write_video_apart(*arguments: Any) -> None:
    """Call `write_video` in its own process.

    As root, SVT-AV1 gives the calling thread real-time scheduling at the highest priority. Processes started from that
    thread inherit it and would starve the machine.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(write_video, *arguments).result()


def write_mp4(path: Path, video_THWC: Video | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_clip(plain_video() if video_THWC is None else video_THWC))
    return path


def write_frames(folder: Path, video_THWC: Video, name: str = "%05d.jpg", first: int = 1, quality: int = 95) -> Path:
    """Write one JPEG file per frame."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for number, image_HWC in enumerate(video_THWC, start=first):
        Image.fromarray(image_HWC).save(folder / (name % number), quality=quality, subsampling=0)
    return folder


def smooth_flow(fields: int = 16, height: int = 48, width: int = 64, seed: int = 0) -> Video:
    """Return optical flow, uint8 (F, 2, H, W): x and y differ, and so do all flow fields."""
    return np.ascontiguousarray(smooth_video(fields, height, width, seed)[..., :2].transpose(0, 3, 1, 2))


def write_flow(folder: Path, flow_F2HW: Video, name: str = "flow_{xy}_%05d.jpg", first: int = 1) -> Path:
    """Write two grey JPEG files per flow field; without `{xy}` in the name one file, with x in red and y in green."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for number, field_2HW in enumerate(flow_F2HW, start=first):
        if "{xy}" not in name:
            blank_HW = np.zeros_like(field_2HW[0])
            image = Image.fromarray(np.stack([*field_2HW, blank_HW], axis=-1))
            image.save(folder / (name % number), quality=95, subsampling=0)
            continue
        for component, image_HW in zip("xy", field_2HW, strict=True):
            Image.fromarray(image_HW).save(folder / (name.replace("{xy}", component) % number), quality=95)
    return folder


def write_both_kinds(folder: Path, clips: dict[str, int]) -> None:
    """Write a data set for `prepare.py folder`: videos in class `one`, the same clips as JPEG frames in class `two`."""
    for split, count in clips.items():
        for number in range(count):
            video_THWC = smooth_video(8, seed=number)
            write_video(folder / split / "one" / f"{number}.mp4", video_THWC)
            write_frames(folder / split / "two" / f"{number}", video_THWC)


def write_clips(manifest: Path, videos: Iterable[Video]) -> None:
    """Write a file per video_THWC next to a manifest of them; labels are 0, 1, 2, 0, 1, 2, ..."""
    rows = []
    for index, video_THWC in enumerate(videos):
        path = manifest.with_name(f"{index}.mp4")
        path.write_bytes(encode_clip(video_THWC))
        rows.append(ManifestRow(path=path.name, offset=0, label=index % 3, **vars(scan_clip(path))))
    write_manifest(manifest, rows, ["a", "b", "c"])


def renumber(manifest: Path, target: Path, classes: list[str]) -> Path:
    """Write a manifest of the same clips whose classes have another order, and with it other numbers."""
    old = Manifest.open(manifest)
    rows = [old.row(index) for index in range(len(old))]
    labels = [classes.index(old.classes[row.label]) for row in rows]
    target.parent.mkdir(parents=True, exist_ok=True)
    moved = [replace(row, path=str(old.root / row.path), label=label) for row, label in zip(rows, labels, strict=True)]
    write_manifest(target, moved, classes)
    return target


def turned(path: Path, degrees: int) -> Path:
    """Write a rotation by `degrees` clockwise into the track header."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return with_matrix(path, (cosine, sine, -sine, cosine))


def with_matrix(path: Path, matrix: tuple[float, ...]) -> Path:
    """Write the parts a, b, c, d of a display matrix into the track header (ISO 14496-12, 8.3.2)."""
    content = bytearray(path.read_bytes())
    matrix_at = content.index(b"tkhd") + 4 + 40
    a, b, c, d = (round(part * (1 << 16)) for part in matrix)
    content[matrix_at : matrix_at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path
