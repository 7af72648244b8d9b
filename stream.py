"""Run a past-only network on a live camera or a video, frame by frame. Needs the run, or an ONNX export, only.

    python stream.py outputs/NAME 0                              # the first camera, until Ctrl-C
    python stream.py outputs/NAME a.mp4 --output annotated.mp4
    python stream.py outputs/NAME a.mp4 --top 1 --fps 10 distributed.device=cpu
    python stream.py outputs/NAME/export/onnx-fp32-stream a.mp4

Each frame that the network takes gives a JSON line, and the last line has the frames per second and the latency. --output draws
the same on every frame. Frames are chosen by their times, at the distance that the run was trained for. Cameras need OpenCV (the
extra `camera`). docs/streaming.md has more.
"""

import sys

from runtime.environment import start_program
from runtime.gc_freeze import frozen_imports
from runtime.stop_signals import handle_stop_signals


def main() -> int:
    with frozen_imports():
        from training.deploy.stream_command import run_stream

    return run_stream(sys.argv[1:], __doc__ or "")


if __name__ == "__main__":
    handle_stop_signals()
    start_program()
    sys.exit(main())
