"""The scan lets the fast decoder decode only files in which its frames are those of the sequential decode."""

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.decoding import fast_decoder
from pipelines.decoding.decode import decode_clip
from pipelines.errors import BadClip
from pipelines.manifest import ManifestRow
from pipelines.prepare.scan import seek_check, write_manifests
from pipelines.prepare.scan.scan_clip import ClipFacts, scan_clip
from pipelines.prepare.scan.seek_check import Packets
from pipelines.prepare.scan.write_manifests import scan_one
from tests.helpers.clips import smooth_video, write_video

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg program: apt-get install ffmpeg")


@settings(max_examples=60)
@given(frames=st.integers(1, 400), gop=st.integers(1, 300), seed=st.integers(0, 2**40))
def test_the_requests_are_few_and_repeatable(frames: int, gop: int, seed: int) -> None:
    packets = Packets(0, 0.04, list(range(frames)), list(range(0, frames, gop)))
    requests = packets.requests(seed)
    assert requests == packets.requests(seed)
    assert all(0 <= number < frames for request in requests for number in request)
    assert all(sorted(request) == request for request in requests)
    seeks = requests[:-1]
    assert seeks == sorted(seeks, reverse=True) and [0] in [request[:1] for request in seeks]
    # Frames from the key frame before each request to its last frame.
    decoded = sum(request[-1] - request[0] // gop * gop + 1 for request in seeks)
    assert decoded <= max(48, frames // 3)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"x264-params": "keyint=10:bframes=2:b-adapt=0"}
    return write_video(tmp_path_factory.mktemp("seek") / "clip.mp4", smooth_video(30), options=options)


def test_an_ordinary_clip_passes(clip: Path) -> None:
    assert scan_clip(clip).fast_seek


class Wrong:
    """A decoder whose frames are wrong in one way."""

    def __init__(self, decoder: Any, way: str) -> None:
        self._decoder, self._way = decoder, way
        self.stream_index = 1 if way == "other stream" else decoder.stream_index

    def __len__(self) -> int:
        return len(self._decoder) - (self._way == "one frame less")

    def get_frames_at(self, numbers: list[int]) -> Any:
        shift = 1 if self._way == "other frames" else 0
        batch = self._decoder.get_frames_at([max(0, number - shift) for number in numbers])
        data, seconds = batch.data, batch.pts_seconds
        if self._way == "only other pixels":
            data = data + 3
        if self._way == "only other times":
            seconds = seconds + 0.02
        if self._way == "an error":
            raise RuntimeError("no more frames")
        return SimpleNamespace(data=data, pts_seconds=seconds)


@pytest.mark.parametrize(
    "way", ["other frames", "only other pixels", "only other times", "one frame less", "other stream", "an error"]
)
def test_a_decoder_with_other_frames_does_not_pass(clip: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    real = fast_decoder.open_fast
    monkeypatch.setattr(fast_decoder, "open_fast", lambda video: Wrong(real(video), way))
    assert not scan_clip(clip).fast_seek
    # A clip of our own encoder is not compared.
    assert scan_clip(clip, ours=True).fast_seek


def test_without_torchcodec_nothing_passes(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (seek_check, write_manifests):
        monkeypatch.setattr(module, "fast_decoder_loads", lambda: False)
    scanned = scan_one((clip.parent, clip.name, None))
    assert scanned.facts is not None and scanned.facts.fast_seek is None
    # A later scan compares the frames only where torchcodec loads.
    assert scan_one((clip.parent, clip.name, scanned)) is scanned
    monkeypatch.setattr(write_manifests, "fast_decoder_loads", lambda: True)
    assert scan_one((clip.parent, clip.name, scanned)) is not scanned


def test_the_container_counts_and_not_the_files_name(clip: Path, tmp_path: Path) -> None:
    avi = write_video(tmp_path / "clip.avi", smooth_video(30), options={"bf": "0"})
    for source, suffix, passes in ((avi, ".mp4", False), (clip, ".avi", True), (clip, "", True)):
        path = shutil.copy(source, tmp_path / f"named{suffix}")
        assert scan_clip(path).fast_seek is passes


@needs_ffmpeg
def test_a_clip_with_discarded_packets_does_not_pass(clip: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.mp4"
    command = ["ffmpeg", "-v", "error", "-ss", "0.7", "-i", str(clip), "-c", "copy", str(path)]
    subprocess.run(command, check=True, timeout=60)
    facts = scan_clip(path)
    assert facts.num_frames < 20 and not facts.fast_seek
    row = ManifestRow(path.name, 0, label=0, **asdict(facts))
    last = decode_clip("torchcodec", tmp_path, row, np.array([facts.num_frames - 1]))
    assert (last.float() - torch.from_numpy(smooth_video(30)[-1]).permute(2, 0, 1)).abs().mean() < 3


# --- What is a usable clip --------------------------------------------------------------------------------------------


def write_two_sizes(path: Path, width: int) -> Path:
    """Write VP8 whose images change from 64 to `width` in the middle, as video calls do."""
    with av.open(str(path), "w", format="webm") as container:
        stream: Any = None
        for part, wide in enumerate((64, width)):
            encoder: Any = av.CodecContext.create("libvpx", "w")
            encoder.width, encoder.height, encoder.pix_fmt = wide, 48, "yuv420p"
            encoder.time_base = Fraction(1, 24)
            if stream is None:
                stream = container.add_stream("libvpx", rate=24)
                stream.width, stream.height, stream.pix_fmt = wide, 48, "yuv420p"
            for packet in _packets(encoder, smooth_video(8, 48, wide)):
                packet.stream = stream
                packet.pts += 8 * part
                packet.dts = packet.pts
                packet.time_base = Fraction(1, 24)
                container.mux(packet)
    return path


def _packets(encoder: Any, video_THWC: np.ndarray) -> Iterator[Any]:
    for number, image_HWC in enumerate(video_THWC):
        frame = av.VideoFrame.from_ndarray(image_HWC, format="rgb24")
        frame.pts, frame.time_base = number, Fraction(1, 24)
        yield from encoder.encode(frame)
    yield from encoder.encode(None)


def test_one_size_throughout(tmp_path: Path) -> None:
    assert scan_clip(write_two_sizes(tmp_path / "one.webm", 64)).num_frames == 16
    path = write_two_sizes(tmp_path / "two.webm", 32)
    with pytest.raises(BadClip, match="frame 8 is 32x48, the first frame 64x48. Fix: encode"):
        scan_clip(path)
    # Training decodes by the same rule, whatever a manifest says.
    facts = ClipFacts(path.stat().st_size, 16, "vp8", 64, 48, 0, fast_seek=False)
    for decoder in ("pyav", "torchcodec"):
        with pytest.raises(BadClip, match="frame 8 is 32x48"):
            decode_clip(decoder, tmp_path, ManifestRow(path.name, 0, label=0, **asdict(facts)), np.array([12]))


@needs_ffmpeg
def test_a_cover_is_not_the_video(clip: Path, tmp_path: Path) -> None:
    """Take the film and not its cover, a larger image that downloaders add as a video stream."""
    cover, path = tmp_path / "cover.jpg", tmp_path / "both.mp4"
    Image.new("RGB", (640, 480)).save(cover)
    maps = ["-map", "0", "-map", "1", "-c", "copy", "-disposition:v:0", "attached_pic"]
    subprocess.run(["ffmpeg", "-v", "error", "-i", str(cover), "-i", str(clip), *maps, str(path)], check=True)
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 2
    facts = scan_clip(path)
    assert (facts.num_frames, facts.width, facts.codec, facts.fast_seek) == (30, 64, "h264", True)
    row = ManifestRow(path.name, 0, label=0, **asdict(facts))
    for decoder in ("pyav", "torchcodec"):
        assert decode_clip(decoder, tmp_path, row, np.arange(8)).shape == (8, 3, 48, 64)
