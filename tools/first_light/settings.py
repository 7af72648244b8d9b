"""Settings of a first-light run, which the main process passes to each phase, and the sizes of the measurements."""

import ctypes
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CHECKOUT = Path(__file__).resolve().parents[2]

Mode = Literal["gpu", "fake", "dry"]

WARNINGS = {
    "gpu": None,
    "fake": "FAKE GPU: no kernel was run. Every figure in this report is MEANINGLESS.",
    "dry": "DRY RUN on the CPU, tiny: every figure in this report is MEANINGLESS.",
}


def find_mode(dry: bool) -> Mode:
    """Return `dry` if requested, `fake` if the fake GPU (tests/fake_gpu) is loaded, else `gpu`."""
    if dry:
        return "dry"
    return "fake" if hasattr(ctypes.CDLL(None), "fake_gpu_count") else "gpu"


def name_of_device(mode: Mode) -> str:
    """Return the name of the device. Except in a dry run, this initialises CUDA."""
    if mode == "dry":
        return f"dry run, {platform.machine()} CPU of {os.cpu_count()} cores"
    import torch

    return torch.cuda.get_device_name()


@dataclass(frozen=True)
class Shape:
    """Network and clips of a measured step."""

    backbone: str
    clips: int
    frames: int
    size: int


TINY = Shape("resnet18", 2, 3, 32)
"""The smallest shape with batch norm over clips, and with a frame that has a previous and a next one."""


@dataclass(frozen=True)
class Settings:
    """Settings of a phase."""

    mode: Mode
    out: Path
    """Folder for the results: few files, because a remote machine may return only some."""
    work: Path
    """Folder for data and runs, deleted at the end."""
    deadline_s: float
    """End of the phase on the clock of time.monotonic(), which all processes of a machine share."""
    device_name: str
    """Name of the device, which every figure of the report carries."""
    nccl: Path | None = None
    """An NCCL library that lets two ranks share a GPU, used instead of torch's."""

    @property
    def device(self) -> str:
        return "cpu" if self.mode == "dry" else "cuda"

    @property
    def tiny(self) -> bool:
        """True if the run only tests the code and measures nothing."""
        return self.mode != "gpu"

    @property
    def shape(self) -> Shape:
        """The recipe's 8 clips of 8 x 224 x 224 pixels on a ResNet-50, or TINY."""
        return TINY if self.tiny else Shape("resnet50", 8, 8, 224)

    def left_s(self) -> float:
        return self.deadline_s - time.monotonic()
