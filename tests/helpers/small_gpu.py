"""Train or evaluate as on a GPU whose memory holds few clips at once: `python small_gpu.py train.py OVERRIDES`.

TSM_TEST_FITS is the number of clips that a forward pass in training, and of views that one in an evaluation may have.
"""

import os
import runpy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from training.build.normalise import Normaliser

MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1.00 GiB. Of the allocated memory"
)


def main() -> None:
    fits = int(os.environ["TSM_TEST_FITS"])
    original = Normaliser.__call__

    def normalise(self: Normaliser, video_NTCHW: torch.Tensor) -> torch.Tensor:
        if len(video_NTCHW) > fits:
            raise torch.OutOfMemoryError(MESSAGE)
        return original(self, video_NTCHW)

    Normaliser.__call__ = normalise  # type: ignore[method-assign]
    sys.argv = sys.argv[1:]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        Normaliser.__call__ = original  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
