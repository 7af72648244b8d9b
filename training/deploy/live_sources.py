"""Frames with their times from a video file (PyAV) or a camera (OpenCV), upright and RGB, as training decodes them."""

import queue
import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from pipelines.decoding.orientation import frame_orientation, turned
from pipelines.decoding.video import EncodedVideo, usable_frames, video_stream
from pipelines.errors import BadClip
from training.errors import ConfigError

# Of a source that does not state its rate.
_USUAL_FPS = 30.0


@dataclass(frozen=True)
class LiveFrame:
    time_s: float
    """Seconds since any fixed moment."""
    image_HWC: NDArray[np.uint8]
    """Upright, RGB."""


@dataclass(frozen=True)
class LiveSource:
    name: str
    fps: float
    """Frames per second, as the source states it. Frames have their own times."""
    is_camera: bool
    frames: Iterator[LiveFrame]


@contextmanager
def open_source(named: str) -> Iterator[LiveSource]:
    """Open a camera (its number, or /dev/videoN), or a video file. Raises ConfigError or BadClip."""
    camera = re.fullmatch(r"(?:/dev/video)?(\d+)", named)
    with _camera(int(camera[1])) if camera else _video_file(Path(named)) as source:
        yield source


# --- Video files ------------------------------------------------------------------------------------------------------


@contextmanager
def _video_file(path: Path) -> Iterator[LiveSource]:
    with ExitStack() as stack:
        with _decoding(path):
            container, stream = stack.enter_context(video_stream(EncodedVideo(str(path), path)))
        fps = float(stream.average_rate or _USUAL_FPS)
        yield LiveSource(str(path), fps, False, _video_frames(path, container, stream, fps))


def _video_frames(path: Path, container: Any, stream: Any, fps: float) -> Iterator[LiveFrame]:
    number = None
    with _decoding(path):
        for number, frame in enumerate(usable_frames(str(path), container, stream)):
            if number == 0:
                rotation, mirrored = frame_orientation(frame)
            image_HWC = turned(frame.to_ndarray(format="rgb24"), rotation, mirrored)
            yield LiveFrame(number / fps if frame.time is None else frame.time, np.ascontiguousarray(image_HWC))
    if number is None:
        raise BadClip(f"{path}: no frame decodes")


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    try:
        yield
    except BadClip:
        raise
    except av.FFmpegError as error:
        raise BadClip(f"{path}: cannot be decoded ({error.strerror or error})") from error
    except ValueError as error:
        # Of frame_orientation.
        raise BadClip(f"{path}: {error}") from error


# --- Cameras ----------------------------------------------------------------------------------------------------------


@contextmanager
def _camera(number: int) -> Iterator[LiveSource]:
    try:
        import cv2
    except ImportError as error:
        raise ConfigError(
            f"camera {number}: cameras need OpenCV ({error}). Fix: pip install -c constraints.txt opencv-contrib-python-headless "
            "(the extra `camera`), or give a video file"
        ) from error
    capture = cv2.VideoCapture(number)
    if not capture.isOpened():
        capture.release()
        raise ConfigError(
            f"camera {number} cannot be opened. Fix: `ls /dev/video*` shows the cameras; another program may use it, and your user "
            "must be in the group `video`"
        )
    newest = _Newest(capture)
    try:
        fps = capture.get(cv2.CAP_PROP_FPS)
        yield LiveSource(f"camera {number}", fps if fps > 0 else _USUAL_FPS, True, newest.frames())
    finally:
        newest.stop()
        capture.release()


class _Newest:
    """Reads a camera in a thread and keeps only the newest frame: a slow network skips frames, and always gets the latest."""

    def __init__(self, capture: Any) -> None:
        self._capture = capture
        self._queue: queue.Queue[LiveFrame | None] = queue.Queue(maxsize=1)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._read, name="camera", daemon=True)
        self._thread.start()

    def frames(self) -> Iterator[LiveFrame]:
        """Yield the newest frame each time, until the camera ends. Raises ConfigError if it gives none."""
        frame = None
        while (newest := self._queue.get()) is not None:
            frame = newest
            yield frame
        if frame is None:
            raise ConfigError(
                "the camera opens, but gives no frame. Fix: another program may use it; `ls /dev/video*` shows the others, since "
                "many cameras have two devices, one of which gives no images"
            )

    def stop(self) -> None:
        self._stopping.set()
        with suppress(queue.Empty):
            self._queue.get_nowait()
        # A read that waits for a camera without signal cannot be ended: the thread is a daemon.
        self._thread.join(timeout=1.0)

    def _read(self) -> None:
        try:
            while not self._stopping.is_set():
                good, image_HWC = self._capture.read()
                now_s = time.monotonic()
                if not good:
                    break
                with suppress(queue.Empty):
                    self._queue.get_nowait()
                # OpenCV gives BGR.
                self._queue.put(LiveFrame(now_s, np.ascontiguousarray(image_HWC[..., ::-1])))
        finally:
            # After an error too, or the main thread would wait forever.
            if not self._stopping.is_set():
                self._queue.put(None)
