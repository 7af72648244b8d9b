"""Frames from files and cameras: upright, RGB, with their times; errors that say what to do."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest

from pipelines.errors import BadClip
from tests.helpers.clips import plain_video, smooth_video, write_video
from training.deploy.annotated_video import annotate, video_writer
from training.deploy.live_sources import open_source
from training.errors import ConfigError


def test_a_file_gives_its_frames_with_their_times(tmp_path: Path) -> None:
    video_THWC = smooth_video(6)
    path = write_video(tmp_path / "a.mp4", video_THWC)
    with open_source(str(path)) as source:
        frames = list(source.frames)
    assert (source.fps, source.is_camera) == (24.0, False)
    assert [frame.time_s for frame in frames] == pytest.approx([number / 24 for number in range(6)])
    for frame, image_HWC in zip(frames, video_THWC, strict=True):
        assert np.abs(frame.image_HWC.astype(int) - image_HWC).mean() < 5


@pytest.mark.parametrize("content", [None, b"no video"])
def test_a_file_that_is_no_video_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadClip, match=r"a\.mp4: cannot be decoded"), open_source(str(path)):
        pass


# --- Cameras: OpenCV's interface, played by a class -------------------------------------------------------------------


class FakeCapture:
    def __init__(self, number: int) -> None:
        self.number, self.left, self.released = number, 3, False

    def isOpened(self) -> bool:  # noqa: N802
        return self.number == 0

    def get(self, key: int) -> float:
        return 0.0

    def read(self) -> tuple[bool, Any]:
        self.left -= 1
        blue_HWC = np.zeros((4, 6, 3), np.uint8)
        # OpenCV's order is BGR.
        blue_HWC[..., 0] = 200
        return self.left >= 0, blue_HWC

    def release(self) -> None:
        self.released = True


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeCapture]]:
    """Replace OpenCV; the list gets each capture that is opened."""
    captures: list[FakeCapture] = []

    def capture(number: int) -> FakeCapture:
        captures.append(FakeCapture(number))
        return captures[-1]

    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(VideoCapture=capture, CAP_PROP_FPS=5))
    yield captures
    assert all(each.released for each in captures)


@pytest.mark.parametrize("named", ["0", "/dev/video0"])
def test_a_camera_gives_rgb_and_ends(opened: list[FakeCapture], named: str) -> None:
    with open_source(named) as source:
        frames = list(source.frames)
    assert source.is_camera and source.fps == 30
    # At least the newest one; the others may have been replaced before they were taken.
    assert frames and all(frame.image_HWC[0, 0].tolist() == [0, 0, 200] for frame in frames)
    assert [frame.time_s for frame in frames] == sorted(frame.time_s for frame in frames)


def test_a_camera_may_be_left_early(opened: list[FakeCapture]) -> None:
    with open_source("0") as source:
        next(source.frames)


def test_a_camera_that_does_not_open_is_refused(opened: list[FakeCapture]) -> None:
    with pytest.raises(ConfigError, match=r"camera 1 cannot be opened\. Fix: .*/dev/video"), open_source("1"):
        pass


def test_a_camera_without_frames_is_refused(opened: list[FakeCapture], monkeypatch: pytest.MonkeyPatch) -> None:
    """At its first read, or by an error in OpenCV: neither waits forever, and neither counts as a stream."""
    monkeypatch.setattr(FakeCapture, "read", lambda self: (False, None))
    with pytest.raises(ConfigError, match=r"gives no frame\. Fix: "), open_source("0") as source:
        list(source.frames)
    monkeypatch.setattr(FakeCapture, "read", lambda self: (True, None))
    monkeypatch.setattr("threading.excepthook", lambda arguments: None)
    with pytest.raises(ConfigError, match=r"gives no frame\. Fix: "), open_source("0") as source:
        list(source.frames)


def test_without_opencv_a_camera_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with (
        pytest.raises(ConfigError, match=r"need OpenCV.*Fix: pip install.*opencv-contrib-python-headless"),
        open_source("0"),
    ):
        pass


# --- Annotated video --------------------------------------------------------------------------------------------------


def test_an_annotated_image_has_bars_as_long_as_the_scores() -> None:
    image_HWC = np.full((240, 320, 3), 255, np.uint8)
    drawn_HWC = annotate(image_HWC, {"wave": 0.75, "clap": 0.25}, "25.0 frames/s")
    assert drawn_HWC.shape == image_HWC.shape and drawn_HWC.dtype == np.uint8
    blue_HW = drawn_HWC[..., 2].astype(int) - drawn_HWC[..., 0] > 80
    # The bar's first row of pixels has no text.
    assert blue_HW[1].sum() == pytest.approx(240, abs=2)
    assert blue_HW[16].sum() == pytest.approx(80, abs=2)
    # Below the lines nothing is drawn.
    assert (drawn_HWC[50:] == 255).all()
    assert annotate(image_HWC[:48, :80], {}, "").shape == (240, 400, 3)


def test_a_long_text_is_not_cut() -> None:
    """Nothing reaches the right edge: neither of a speed with three percentiles nor of a class name like a sentence."""
    image_HWC = np.zeros((256, 256, 3), np.uint8)
    status = "12.5 frames/s   ms: p50 131.4  p95 201.9  p99 225.1"
    for scores, text in (({"Pretending to put something next to something": 0.0}, ""), ({}, status)):
        bright_W = (annotate(image_HWC, scores, text).max(2) > 60).any(0)
        assert bright_W[128:240].any() and not bright_W[-4:].any()


def test_the_video_keeps_times_and_content(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    times_s = [10.0, 10.04, 10.2, 10.2, 11.0]
    with video_writer(path, 25.0) as write:
        for time_s, image_HWC in zip(times_s, plain_video(5, 33, 47), strict=True):
            write(time_s, image_HWC)
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    assert (frames[0].width, frames[0].height) == (46, 32)
    assert [frame.time for frame in frames] == pytest.approx([0.0, 0.04, 0.2, 0.2, 1.0], abs=0.001)
    levels = [frame.to_ndarray(format="rgb24").mean() for frame in frames]
    assert levels == pytest.approx([90, 100, 110, 120, 130], abs=3)


def test_a_failure_leaves_no_video(tmp_path: Path) -> None:
    def fail() -> None:
        with video_writer(tmp_path / "out.mp4", 25.0) as write:
            write(0.0, plain_video(1)[0])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
