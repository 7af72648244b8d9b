"""Find out whether the fast decoder gives the right frames of a video: it seeks, and seeking can land elsewhere than counting.

Two kinds of evidence. The packets: containers with a time for each frame, as many packets as frames, none that the container
discards (edit lists of cut clips), the times of the frames. And pixels: frames that the fast decoder gives after a seek are
compared with those of the sequential decode, around key frames and at random places.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.decoding.video import TIMED_FORMATS, EncodedVideo

_TOLERANCE = 1.5
"""Mean grey levels by which two versions of FFmpeg's libraries may differ in a frame."""
_LEAST_DECODED = 48
"""Frames to decode for the comparison in any clip; in longer clips, a third of the clip's."""
_PLACES = 4
_PIXELS_COMPARED = 1 << 16


@dataclass(frozen=True)
class Packets:
    """The packets of a video whose evidence is in favour of the fast decoder, in the order of decoding."""

    stream_index: int
    time_base: float
    """Seconds."""
    times: list[int]
    """Display times in units of the time base, all different."""
    key_positions: list[int]
    """Positions of the key frames in `times`; the first is 0."""

    @cached_property
    def shown(self) -> list[int]:
        """The positions in display order."""
        return sorted(range(len(self.times)), key=self.times.__getitem__)

    def requests(self, seed: int) -> list[list[int]]:
        """Choose groups of frames to ask for, by their numbers in display order; the same for the same seed.

        They are around key frames, at the end and at random places. In descending order, so that each makes the decoder seek;
        the last asks across the whole clip.
        """
        dice, last = random.Random(seed), len(self.times) - 1
        number_of = {position: number for number, position in enumerate(self.shown)}
        keys = [number_of[position] for position in self.key_positions]
        chosen = sorted({keys[0], keys[-1], *dice.sample(keys, min(_PLACES - 2, len(keys)))})
        after = [[key, key + 2] for key in chosen]
        before = [[key - 1] for key in chosen]
        anywhere = [[dice.randint(0, last)] for _ in range(_PLACES)]
        budget, requests = max(_LEAST_DECODED, len(self.times) // 3), []
        for numbers in [*after, [last], *dice.sample(before, len(before)), *anywhere]:
            request = [number for number in numbers if 0 <= number <= last]
            cost = self._cost(request, keys) if request else budget
            if cost < budget:
                budget -= cost
                requests.append(request)
        across = sorted({min(key + dice.randint(0, 2), last) for key in chosen})
        return [*sorted(requests, reverse=True), across]

    def _cost(self, request: list[int], keys: list[int]) -> int:
        """Estimate the frames to decode from the key frame before a request up to its last frame."""
        start = max((key for key in keys if key <= request[0]), default=keys[0])
        return max(self.shown[number] for number in request) - self.shown[start] + 2


def read_packets(container: Any, stream: Any) -> Packets | None:
    """Read the packets of a video. Returns None if the fast decoder could count other frames than PyAV."""
    if container.format.name not in TIMED_FORMATS:
        return None
    packets = [packet for packet in container.demux(stream) if packet.size]
    times = [packet.pts for packet in packets]
    keys = [position for position, packet in enumerate(packets) if packet.is_keyframe]
    if not keys or keys[0] != 0 or None in times or len(set(times)) < len(times):
        return None
    if any(packet.is_discard for packet in packets):
        return None
    return Packets(stream.index, float(stream.time_base), times, keys)


@cache
def fast_decoder_loads() -> bool:
    """Tell whether torchcodec loads here; without it nothing shows that its frames are right."""
    # Imported here because it loads torch.
    from pipelines.decoding.decode import choose_decoder

    return choose_decoder("auto") == "torchcodec"


class SeekCheck:
    """Collects frames of the sequential decode, then compares the fast decoder's."""

    def __init__(self, packets: Packets | None, seed: int, only_packets: bool) -> None:
        self._packets = packets
        self._requests = packets.requests(seed) if packets is not None and not only_packets else []
        self._numbers = {number for request in self._requests for number in request}
        self._images: dict[int, NDArray[np.uint8]] = {}
        self._times: list[int | None] = []

    def add(self, frame: Any) -> None:
        """Take the next frame in display order."""
        if len(self._times) in self._numbers:
            self._images[len(self._times)] = _sample(frame.to_ndarray(format="rgb24", threads=1))
        self._times.append(frame.pts)

    def passes(self, video: EncodedVideo, rotation: int) -> bool | None:
        """Tell whether the fast decoder may decode the video, of which all frames have been added; None: it is not installed."""
        packets = self._packets
        if packets is None or self._times != sorted(packets.times):
            return False
        if not self._requests:
            return True
        if not fast_decoder_loads():
            return None
        from pipelines.decoding.fast_decoder import open_fast

        try:
            decoder = open_fast(video)
            if decoder.stream_index != packets.stream_index or len(decoder) != len(self._times):
                return False
            return all(self._agrees(*found, rotation) for found in _frames(decoder, self._requests))
        # torchcodec's errors for files that it cannot read.
        except (RuntimeError, ValueError, IndexError):
            return False

    def _agrees(self, number: int, seconds: float, image_HWC: NDArray[np.uint8], rotation: int) -> bool:
        assert self._packets is not None
        time = self._times[number]
        assert time is not None
        expected_HWC = self._images[number]
        found_HWC = _sample(np.rot90(image_HWC, -(rotation // 90)))
        if abs(seconds - time * self._packets.time_base) > self._packets.time_base / 2:
            return False
        if found_HWC.shape != expected_HWC.shape:
            return False
        return float(np.abs(found_HWC.astype(np.int16) - expected_HWC).mean()) <= _TOLERANCE


def _frames(decoder: Any, requests: list[list[int]]) -> Iterator[tuple[int, float, NDArray[np.uint8]]]:
    """Yield (number, display time in seconds, upright image) of each requested frame."""
    for request in requests:
        batch = decoder.get_frames_at(request)
        images_THWC = batch.data.permute(0, 2, 3, 1).numpy()
        yield from zip(request, batch.pts_seconds.tolist(), images_THWC, strict=True)


def _sample(image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Copy an even sample of an image's pixels, because many whole frames could fill the memory."""
    step = max(1, round((image_HWC.shape[0] * image_HWC.shape[1] / _PIXELS_COMPARED) ** 0.5))
    return image_HWC[::step, ::step].copy()
