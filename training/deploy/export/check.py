"""Run an exported file against PyTorch, frame by frame, before it is kept."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from runtime.exit_codes import EXIT_FAILURE
from training.build.normalise import MEAN_C, STD_C

from .forms import Exportable

Run = Callable[[list[Tensor]], list[Tensor]]
"""Computes an exported file's outputs from its inputs, in the order of Exportable's."""

FRAMES = 64
FP32_LIMIT = 1e-4
"""Largest difference between a logit and PyTorch's, relative to the largest logit."""
# A batch that became a constant shows only in other batches than the traced one.
_MORE_BATCHES, _MORE_FRAMES = (2, 3, 5), 8


class ExportError(RuntimeError):
    """The exported file does not compute what PyTorch computes, so it is not kept."""

    exit_code = EXIT_FAILURE


@torch.no_grad()
def largest_difference(network: Exportable, run: Run, batch: int | None) -> float:
    """Return the largest difference between the file's logits and PyTorch's, relative to PyTorch's largest logit.

    Runs 64 frames: one stream with its caches carried, or clips one by one. Then 8 frames of 2, 3 and 5 streams or clips at
    once, unless the file takes only `batch`. Raises ExportError if the file does not run or gives another result than logits.
    """
    expected, got = [], []
    for count, frames in [(batch or 1, FRAMES)] + [(more, _MORE_FRAMES) for more in _MORE_BATCHES if batch is None]:
        # Whole clips.
        frames = -(-frames // network.num_frames) * network.num_frames
        video_NTCHW = random_video(count, frames, network.size, count, network.modality)
        expected.append(logits_over(network, network.run, video_NTCHW).flatten())
        try:
            got.append(logits_over(network, run, video_NTCHW).flatten())
        # Each runtime has errors of its own.
        except Exception as error:
            raise ExportError(f"the exported file does not run with a batch of {count}: {error}") from error
    expected_L, got_L = torch.cat(expected).double(), torch.cat(got).double()
    if got_L.shape != expected_L.shape or not got_L.isfinite().all():
        raise ExportError("the exported file gives logits of another shape, or that are not finite")
    return float((expected_L - got_L).abs().max() / expected_L.abs().max())


def logits_over(network: Exportable, run: Run, video_NTCHW: Tensor) -> Tensor:
    """Return the logits of each call, (N, calls, K): of every frame of a stream, whose caches are carried, or of every clip."""
    batch = video_NTCHW.shape[0]
    if network.form == "clip":
        return torch.stack([run([clip_NTCHW])[0] for clip_NTCHW in video_NTCHW.split(network.num_frames, 1)], 1)
    return stream_over(run, video_NTCHW, network.zeros(batch)[1:])[0]


def stream_over(run: Run, video_NTCHW: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the logits of each frame of N streams, (N, T, K), and the caches after the last one."""
    logits = []
    for frame_NCHW in video_NTCHW.unbind(1):
        logit_NK, *caches = run([frame_NCHW, *caches])
        logits.append(logit_NK)
    return torch.stack(logits, 1), caches


def random_video(batch: int, frames: int, size: int, seed: int, modality: str = "rgb") -> Tensor:
    """Return normalised random frames (N, T, C, H, W): large areas of one level, as a video has, and noise."""
    generator = torch.Generator().manual_seed(seed)
    mean_C11, std_C11 = (torch.tensor(values[modality]).view(-1, 1, 1) for values in (MEAN_C, STD_C))
    channels = len(mean_C11)
    coarse_BCHW = 255 * torch.rand(batch * frames, channels, 4, 4, generator=generator)
    noise_BCHW = 64 * torch.rand(batch * frames, channels, size, size, generator=generator) - 32
    level_BCHW = (interpolate(coarse_BCHW, (size, size), mode="bilinear") + noise_BCHW).round().clamp(0, 255)
    return ((level_BCHW - mean_C11) / std_C11).unflatten(0, (batch, frames))
