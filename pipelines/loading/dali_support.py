"""Find out which of a manifest's clips DALI decodes as FFmpeg does on this machine, and choose its input accordingly."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.decoding.decode import decode_clip
from pipelines.errors import BadClip
from pipelines.manifest import Manifest, ManifestRow

from .dali_batches import FRAMES, GREY_IMAGES, IMAGES, PER_IMAGE, VIDEOS, EncodedSource, Kind, kind_of, why_on_host
from .dali_graph import DaliError, error_reason, import_dali, make_pipeline, samples_of

# Clips to try per codec before DALI counts as unable to decode it.
_ROWS_TRIED = 5
# Levels by which the mean colour of a part of an image may differ from FFmpeg's. Decoders differ by up to 2 there, and by 10 and
# more where one takes another matrix or range.
_COLOUR_LIMIT = 6.0


@dataclass(frozen=True)
class Feed:
    """The input to DALI: VIDEOS, IMAGES or GREY_IMAGES of `codecs`, while the host decodes the other clips; or FRAMES decoded on
    the host, if DALI decodes none of the manifest's clips."""

    kind: str
    codecs: frozenset[str]
    others: dict[str, str]
    """Codecs that the host decodes, with the reason."""
    excluded: dict[str, int]
    """Reasons why the host decodes some clips of `codecs`, with the number of clips."""


@cache
def choose_feed(manifest_path: Path, device: torch.device) -> Feed:
    """Choose DALI's input by letting it decode a clip of each codec in the manifest on this device.

    The codecs that DALI decodes depend on its version and, on GPUs, on the chip. Raises DaliError if DALI does not load, or if
    the GPU's decoder is broken.
    """
    import_dali()
    manifest = Manifest.open(manifest_path)
    kinds: dict[str, list[Kind]] = defaultdict(list)
    counts: Counter[str] = Counter()
    others: dict[str, str] = {}
    excluded: dict[str, Counter[str]] = defaultdict(Counter)
    for values, count in manifest.kinds(*Kind._fields).items():
        kind = Kind(*values)
        reason = why_on_host(kind)
        if reason is None:
            kinds[kind.codec].append(kind)
            counts[kind.codec] += count
        else:
            excluded[kind.codec][reason] += count
    for codec in kinds.keys() | excluded.keys():
        reason = _why_not(manifest, kinds[codec], device) if codec in kinds else "; ".join(excluded[codec])
        if reason is not None:
            others[codec] = reason
    known = frozenset(kinds) - frozenset(others)
    if not known:
        _check_decoder(device, others)
        return Feed(FRAMES, frozenset(others), others, {})
    by_kind = {kind: {codec for codec in known if kind_of(codec) == kind} for kind in (VIDEOS, IMAGES, GREY_IMAGES)}
    # The first of those with as many clips.
    most = max(by_kind, key=lambda kind: sum(counts[codec] for codec in by_kind[kind]))
    chosen = frozenset(by_kind[most])
    others |= dict.fromkeys(known - chosen, "one graph decodes either videos or images, and there are fewer of these")
    on_host = sum((excluded[codec] for codec in chosen), Counter())
    return Feed(most, chosen, others, dict(on_host))


def _check_decoder(device: torch.device, others: dict[str, str]) -> None:
    """Raise DaliError if the GPU's decoder is broken: the host would decode everything, and only the log would tell.

    A chip that does not have a codec is another matter: DALI says so in words, without an error of CUDA.
    """
    broken = [f"{codec} ({reason})" for codec, reason in sorted(others.items()) if "CUDA" in reason]
    if device.type == "cuda" and broken:
        raise DaliError(
            f"DALI cannot use the video decoder of {device}: {', '.join(broken)}. Fix: give the container or virtual machine "
            "the driver's video functions (NVIDIA_DRIVER_CAPABILITIES=compute,video,utility), or decode on the host with "
            "pipeline=torch"
        )


def describe(feed: Feed, device: torch.device, decoder: str) -> str:
    """Describe the feed in one line for the log."""
    dali = f"DALI {import_dali().__version__}"
    why = [f"{codec} ({reason})" for codec, reason in sorted(feed.others.items())]
    if feed.kind == FRAMES:
        return (
            f"{dali} decodes none of these codecs on {device.type}: {'; '.join(why)}. {decoder} decodes on the host, DALI "
            "augments. Other versions decode others, and prepare.py transcode can write a supported codec"
        )
    why += [f"{count} clips ({reason})" for reason, count in sorted(feed.excluded.items())]
    line = f"{dali} decodes {', '.join(sorted(feed.codecs))} on {device.type}"
    return f"{line}; on the host, by {decoder}: {'; '.join(why)}" if why else line


def _why_not(manifest: Manifest, kinds: list[Kind], device: torch.device) -> str | None:
    """Find the reason why DALI cannot decode these clips of one codec as FFmpeg does; None if it can.

    It tries the middle frame of a clip: the first is often black, which has the same colours in every colour space.
    """
    rows = sorted(index for kind in kinds for index in manifest.rows_of(_ROWS_TRIED, **kind._asdict()))
    reason = "no clip of it could be read"
    for index in rows[:_ROWS_TRIED]:
        row = manifest.row(index)
        try:
            theirs_HWC = _host_frame(manifest.root, row)
            ours_HWC = _dali_frame(manifest.path, row, device)[..., : theirs_HWC.shape[-1]]
        except BadClip:
            continue
        except RuntimeError as error:
            reason = error_reason(error)
            continue
        difference = colour_difference(ours_HWC, theirs_HWC)
        return None if difference <= _COLOUR_LIMIT else f"its colours differ from FFmpeg's by {difference:.0f} levels"
    return reason


def _dali_frame(manifest: Path, row: ManifestRow, device: torch.device) -> NDArray[np.uint8]:
    """Decode a clip's middle frame with DALI, as stored; of optical flow in colour images with the colour that holds none."""
    kind = kind_of(row.codec)
    clip = EncodedSource(manifest, "", feed=kind, codecs=frozenset([row.codec])).one_frame(row, row.num_frames // 2)
    samples = samples_of(kind, [clip], [clip.parts])
    output = make_pipeline(kind, device, 1, len(clip.parts), lambda: samples).run()[0].as_cpu()
    if kind not in PER_IMAGE:
        # DALI reuses the memory of its outputs.
        return np.array(output.at(0))[0]
    return np.concatenate([output.at(number) for number in range(len(clip.parts))], axis=-1)


def _host_frame(root: Path, row: ManifestRow) -> NDArray[np.uint8]:
    """Decode a clip's middle frame with PyAV or torchvision, as stored."""
    upright_CHW = decode_clip("pyav", root, row, np.array([row.num_frames // 2]))[0]
    return upright_CHW.rot90(-(row.rotation // 90), (1, 2)).permute(1, 2, 0).numpy()


def colour_difference(ours_HWC: NDArray[np.uint8], theirs_HWC: NDArray[np.uint8]) -> float:
    """Return the largest difference between the mean colours of 4 x 4 tiles of two images; infinite if their sizes differ.

    Means of tiles, because decoders interpolate colours at edges in different ways.
    """
    if ours_HWC.shape != theirs_HWC.shape:
        return float("inf")
    difference_HWC = ours_HWC.astype(np.float32) - theirs_HWC
    tiles = (
        tile for rows in np.array_split(difference_HWC, 4) for tile in np.array_split(rows, 4, axis=1) if tile.size
    )
    return max(float(np.abs(tile.mean((0, 1))).max()) for tile in tiles)
