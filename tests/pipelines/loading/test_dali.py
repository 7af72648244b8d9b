"""Compare DALI's batches with the torch loader's: same clips, frames, crops and flips, and nearly the same pixels.

Files store colour at a quarter of the resolution. DALI repeats each colour sample where FFmpeg's scaler interpolates,
and DALI reads the weights of its scaling filter from a table. Pixels therefore differ by 1 to 2 levels in the mean, and
by up to 8 at colour edges. The same tests run on a GPU where there is one, and on the CPU with a DALI version that no
longer decodes H.264 there.
"""

import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pipelines.jpeg_clips import JPEG_FLOW, JPEG_FLOW_RG, JPEG_FRAMES
from pipelines.loading.clips import ClipBatch, ClipSource, EvaluationClips, TrainingClips
from pipelines.loading.dali_batches import FRAMES, GREY_IMAGES, IMAGES, VIDEOS, stored_window
from pipelines.loading.dali_graph import DaliError, import_dali
from pipelines.loading.dali_loader import DaliLoader
from pipelines.loading.dali_support import choose_feed, describe
from pipelines.loading.worker_loader import ClipLoader, WorkerLostError, start_worker_server
from pipelines.manifest import ManifestRow, write_manifest
from pipelines.prepare.scan.flow_folders import scan_flow
from pipelines.prepare.scan.frame_folders import scan_frames
from pipelines.prepare.scan.scan_clip import scan_clip
from pipelines.stream.augmentation import Augmentation, SampleParams
from pipelines.stream.eval_views import EvalProtocol
from pipelines.stream.order import StreamOrder, evaluation_rows
from tests.helpers.clips import smooth_flow, smooth_video, turned, write_flow, write_frames, write_video
from tests.helpers.jobs import differing, make_clips, start_training
from tests.helpers.worlds import World
from tools.fetch_dali import VERSION, fetch_dali

CLIPS, SEED = 6, 3
AUGMENTATION = Augmentation(num_frames=4, size=64, flip="on")
# In levels of 0 to 255.
MEAN_LIMIT, P99_LIMIT = 2.0, 8.0
CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

ENCODERS = {
    "h264": ("mp4", "libx264", "yuv420p"),
    "hevc": ("mp4", "libx265", "yuv420p"),
    "vp8": ("webm", "libvpx", "yuv420p"),
    "vp9": ("webm", "libvpx-vp9", "yuv420p"),
    "mjpeg": ("mkv", "mjpeg", "yuvj420p"),
    "mpeg4": ("avi", "mpeg4", "yuv420p"),
}


@pytest.fixture(scope="module", autouse=True)
def _dali() -> None:
    try:
        import_dali()
    except DaliError as error:
        pytest.skip(str(error))
    start_worker_server()


@pytest.fixture(autouse=True)
def _no_known_feeds() -> None:
    """Forget what DALI decodes of the manifests so far: a test's folder can have the name of an earlier test's."""
    choose_feed.cache_clear()


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def knows_h264() -> bool:
    """Return whether this DALI decodes H.264 and HEVC on the CPU; later versions do not."""
    return tuple(int(part) for part in import_dali().__version__.split(".")[:3]) <= (2, 1, 0)


def video(number: int) -> NDArray[np.uint8]:
    """A video with its own length, alternating between three frame sizes."""
    return smooth_video(20 + number, *((96, 128), (96, 160), (128, 96))[number % 3], seed=number)


def write_clip(folder: Path, number: int, codec: str, rotation: int = 0) -> ManifestRow:
    """Write a video file or a folder of JPEG files; its row has label 0 or 1."""
    if codec == JPEG_FRAMES:
        series, facts = scan_frames(write_frames(folder / str(number), video(number)))
        return ManifestRow(f"{number}/{series.pattern}", series.first, label=number % 2, **asdict(facts))
    suffix, encoder, pix_fmt = ENCODERS[codec]
    path = write_video(folder / f"{number}.{suffix}", video(number), encoder, pix_fmt)
    if rotation:
        turned(path, rotation)
    return ManifestRow(path.name, 0, label=number % 2, **asdict(scan_clip(path)))


def write_clips(folder: Path, codecs: list[str], rotations: tuple[int, ...] = (0,) * CLIPS) -> Path:
    """Write clips that cycle through these codecs; return their manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [write_clip(folder, number, codecs[number % len(codecs)], rotations[number]) for number in range(CLIPS)]
    write_manifest(folder / "train.arrow", rows, ["a", "b"])
    return folder / "train.arrow"


def training(manifest: Path, augmentation: Augmentation = AUGMENTATION) -> TrainingClips:
    return TrainingClips(ClipSource(manifest, "pyav"), augmentation, SEED)


def evaluation(manifest: Path, crops: int = 1) -> EvaluationClips:
    return EvaluationClips(ClipSource(manifest, "pyav"), EvalProtocol(4, 64, "uniform_validation", crops))


def positions(batches: int, size: int, first: int = 0) -> list[NDArray[np.int64]]:
    return [np.arange(number * size, (number + 1) * size) for number in range(first, first + batches)]


def check_same_clips(ours: ClipBatch, theirs: ClipBatch) -> None:
    for name in ("label_N", "row_N", "real_N"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    bad = [[replace(record, reason="") for record in batch.bad_clips] for batch in (ours, theirs)]
    # Each decoder words its reasons differently.
    assert bad[0] == bad[1] and all(record.reason for record in ours.bad_clips)
    assert ours.video_NTCHW.shape == theirs.video_NTCHW.shape


def check_alike(ours: list[ClipBatch], theirs: list[ClipBatch]) -> None:
    """Check that both lists hold the same clips, with pixels within the limits."""
    for one, other in zip(ours, theirs, strict=True):
        check_same_clips(one, other)
        difference = (one.video_NTCHW.cpu().float() - other.video_NTCHW.float()).abs()
        assert difference.mean() < MEAN_LIMIT, difference.mean()
        assert difference.flatten().kthvalue(int(0.99 * difference.numel())).values <= P99_LIMIT


def both(
    dataset: TrainingClips | EvaluationClips, batch_indices: list, device: torch.device = CPU, workers: int = 0
) -> tuple[list[ClipBatch], list[ClipBatch]]:
    ours = list(DaliLoader(dataset, workers, 2, device, 2).batches(batch_indices))
    return ours, list(ClipLoader(dataset, 0, 2).batches(batch_indices))


# --- Decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [*ENCODERS, JPEG_FRAMES])
def test_training_batches(tmp_path: Path, device: torch.device, codec: str) -> None:
    manifest = write_clips(tmp_path, [codec])
    ours, theirs = both(training(manifest), positions(4, 3), device)
    check_alike(ours, theirs)
    assert all(batch.video_NTCHW.device.type == device.type for batch in ours)
    feed = choose_feed(manifest, device)
    if codec == JPEG_FRAMES:
        assert feed.kind == IMAGES
    elif device.type == "cuda":
        # NVDEC of every data-centre GPU since 2018 decodes these. Without this check, batches from the host would pass.
        assert feed.kind == VIDEOS or codec not in ("h264", "hevc", "vp9"), describe(feed, device, "pyav")
    else:
        on_host = codec == "mpeg4" or (codec in ("h264", "hevc") and not knows_h264())
        assert feed.kind == (FRAMES if on_host else VIDEOS)
        said = describe(feed, device, "pyav")
        assert ("decodes none of these codecs" in said) == on_host and codec in said


@pytest.mark.gpu
@pytest.mark.parametrize("codec", ["h264", "vp9"])
def test_batches_are_whole_behind_a_full_queue(tmp_path: Path, codec: str) -> None:
    """Copy each batch before DALI reuses its buffers, even when the torch stream has a backlog."""
    device = torch.device("cuda")
    dataset, batch_indices = training(write_clips(tmp_path, [codec])), positions(20, 3)
    busy_NN = torch.randn(8192, 8192, device=device)
    ours = []
    for batch in DaliLoader(dataset, 0, 2, device, 2).batches(batch_indices):
        # The clone is queued on the stream too.
        ours.append(replace(batch, video_NTCHW=batch.video_NTCHW.clone()))
        # At least 50 ms on any current GPU.
        for _ in range(4):
            busy_NN = torch.nn.functional.normalize(busy_NN @ busy_NN)
    torch.cuda.synchronize()
    check_alike(ours, list(ClipLoader(dataset, 0, 2).batches(batch_indices)))


@pytest.mark.parametrize("crops", [1, 10])
@pytest.mark.parametrize("codec", ["vp9", "mpeg4", JPEG_FRAMES])
def test_evaluation_views(tmp_path: Path, device: torch.device, codec: str, crops: int) -> None:
    manifest = write_clips(tmp_path, [codec])
    ours, theirs = both(evaluation(manifest, crops), evaluation_rows(CLIPS, 4, 0, 1), device)
    check_alike(ours, theirs)
    assert ours[-1].real_N.tolist() == [True, True, False, False]


@pytest.mark.parametrize("codecs", [["vp9", "mpeg4"], ["vp9", JPEG_FRAMES, "vp9"], [JPEG_FRAMES, JPEG_FRAMES, "vp9"]])
def test_codecs_that_do_not_go_together(tmp_path: Path, device: torch.device, codecs: list[str]) -> None:
    """Decode the codecs of the minority on the host, with the same batches as a result."""
    manifest = write_clips(tmp_path, codecs)
    feed = choose_feed(manifest, device)
    many = max(set(codecs), key=codecs.count)
    assert feed.kind == (IMAGES if many == JPEG_FRAMES else VIDEOS)
    if device.type == "cpu":
        (other,) = set(codecs) - feed.codecs
        assert other == ("mpeg4" if "mpeg4" in codecs else "vp9" if many == JPEG_FRAMES else JPEG_FRAMES)
        assert f"on the host, by pyav: {other} (" in describe(feed, device, "pyav")
    check_alike(*both(training(manifest), positions(5, 2), device))
    check_alike(*both(evaluation(manifest), evaluation_rows(CLIPS, 2, 0, 1), device))


@pytest.mark.parametrize(
    ("codec", "name", "kind"),
    [(JPEG_FLOW, "flow_{xy}_%05d.jpg", GREY_IMAGES), (JPEG_FLOW_RG, "%06d.jpg", IMAGES)],
)
def test_optical_flow(tmp_path: Path, device: torch.device, codec: str, name: str, kind: str) -> None:
    """Give the channels and the mirror of the torch loader, with clips of several sizes and one that DALI cannot decode."""
    rows = []
    for number in range(CLIPS):
        flow_F2HW = smooth_flow(7 + number, 48, (64, 80)[number % 2], seed=number)
        series, facts = scan_flow(write_flow(tmp_path / str(number), flow_F2HW, name), codec)
        rows.append(ManifestRow(f"{number}/{series.pattern}", series.first, label=number % 2, **asdict(facts)))
    write_manifest(tmp_path / "train.arrow", rows, ["a", "b"])
    manifest = tmp_path / "train.arrow"
    assert choose_feed(manifest, device).kind == kind
    flow = training(manifest, Augmentation(4, 32, flip="on", modality="flow"))
    protocol = EvalProtocol(4, 32, crops=10, modality="flow")
    views = EvaluationClips(ClipSource(manifest, "pyav"), protocol)
    ours, theirs = both(flow, positions(3, 4), device)
    check_alike(ours, theirs)
    check_alike(*both(views, evaluation_rows(CLIPS, 4, 0, 1), device))
    if device.type == "cpu" and codec == JPEG_FLOW:
        # Grey images have no chroma, which decoders interpolate in different ways.
        for one, other in zip(ours, theirs, strict=True):
            assert (one.video_NTCHW.int() - other.video_NTCHW.int()).abs().max() <= 2
    # A header without content: the host has to decode the clip.
    for path in (tmp_path / "4").iterdir():
        path.write_bytes(path.read_bytes()[:400])
    ours, theirs = both(flow, positions(3, 4), device)
    check_alike(ours, theirs)
    assert 4 in {record.row for batch in ours for record in batch.bad_clips}


# FFmpeg's numbers of colour space and range, and whether DALI decodes such clips.
COLOURS: dict[str, tuple[tuple[int, int] | None, bool]] = {
    "untagged": (None, True),
    "bt470bg, limited": ((5, 1), True),
    "smpte170m, limited": ((6, 1), True),
    "bt709, limited": ((1, 1), False),
    "bt709, full": ((1, 2), False),
    "bt470bg, full": ((5, 2), False),
    "bt2020nc, limited": ((9, 1), False),
}


def write_coloured(path: Path, colours: tuple[int, int] | None, codec: str, height: int = 96) -> ManifestRow:
    """Write a video of saturated colours that claims these colours."""
    _, encoder, pix_fmt = ENCODERS[codec]
    write_video(path, smooth_video(4, height, 128, seed=1), encoder, pix_fmt, colours=colours)
    return ManifestRow(path.name, 0, label=0, **asdict(scan_clip(path)))


@pytest.mark.parametrize("codec", ["h264", "vp9"])
def test_colours(tmp_path: Path, device: torch.device, codec: str) -> None:
    """Give FFmpeg's colours, whatever the stream says of them: DALI decodes only the clips that it converts as FFmpeg does."""
    suffix = ENCODERS[codec][0]
    rows = [write_coloured(tmp_path / f"{name}.{suffix}", of[0], codec) for name, of in COLOURS.items()]
    # FFmpeg takes BT.601 for an untagged clip, also where it is large.
    rows.append(write_coloured(tmp_path / f"large.{suffix}", None, codec, height=720))
    write_manifest(tmp_path / "train.arrow", rows, ["a"])
    ours, theirs = both(evaluation(tmp_path / "train.arrow"), evaluation_rows(len(rows), 1, 0, 1), device)
    check_alike(ours, theirs)
    feed = choose_feed(tmp_path / "train.arrow", device)
    if feed.kind == VIDEOS:
        assert sum(feed.excluded.values()) == sum(not decodes for _, decodes in COLOURS.values())
        said = describe(feed, device, "pyav")
        assert "by pyav: 1 clips (colours in bt2020nc, and DALI assumes BT.601); 2 clips (colours in bt709, and" in said
        # The pixels of these clips are the host's.
        exact = [torch.equal(one.video_NTCHW.cpu(), other.video_NTCHW) for one, other in zip(ours, theirs, strict=True)]
        assert exact == [not decodes for _, decodes in COLOURS.values()] + [False]


ON_HOST: list[tuple[str, object, str]] = [
    ("colour_space", "bt709", "colours in bt709, and DALI assumes BT.601"),
    ("colour_space", "", "their manifest has no colour space, and DALI assumes BT.601; run prepare.py again"),
    ("fast_seek", False, "frames that the scan has not found right in a decoder that seeks"),
    ("mirrored", True, "mirrored for display"),
]


@pytest.mark.parametrize(("name", "value", "reason"), ON_HOST)
def test_a_manifest_without_a_clip_for_dali(
    tmp_path: Path, device: torch.device, name: str, value: object, reason: str
) -> None:
    """Decode all clips on the host where DALI's pixels would be others, or the manifest is too old to say."""
    rows = [write_clip(tmp_path, number, "vp9") for number in range(CLIPS)]
    rows = [replace(row, **{name: value}) for row in rows]  # type: ignore[arg-type]
    write_manifest(tmp_path / "train.arrow", rows, ["a", "b"])
    feed = choose_feed(tmp_path / "train.arrow", device)
    assert feed.kind == FRAMES
    assert f"vp9 ({reason}" in describe(feed, device, "pyav")
    check_alike(*both(training(tmp_path / "train.arrow"), positions(2, 3), device))


@pytest.mark.parametrize("orientation", [3, 6])
def test_jpeg_frames_with_an_orientation(tmp_path: Path, device: torch.device, orientation: int) -> None:
    """Treat an EXIF orientation as the host does: 3 is upside down, 6 lies on its side."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    rows = []
    for number in range(CLIPS):
        folder = write_frames(tmp_path / str(number), video(number))
        for path in folder.iterdir():
            with Image.open(path) as image:
                image.copy().save(path, quality=95, subsampling=0, exif=exif)
        series, facts = scan_frames(folder)
        rows.append(ManifestRow(f"{number}/{series.pattern}", series.first, label=0, **asdict(facts)))
    write_manifest(tmp_path / "train.arrow", rows, ["a"])
    assert choose_feed(tmp_path / "train.arrow", device).kind == IMAGES
    check_alike(*both(training(tmp_path / "train.arrow"), positions(2, 3), device))


def test_colours_that_differ_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare a frame with FFmpeg's before DALI decodes a codec: other versions and chips may convert otherwise."""
    row = write_coloured(tmp_path / "0.webm", (1, 1), "vp9")
    write_manifest(tmp_path / "train.arrow", [row], ["a"])
    monkeypatch.setattr("pipelines.loading.dali_support.why_on_host", lambda _: None)
    assert "vp9 (its colours differ from FFmpeg's by" in describe(
        choose_feed(tmp_path / "train.arrow", CPU), CPU, "pyav"
    )


BROKEN = """Error in MIXED operator `nvidia.dali.fn.decoders.video`,
encountered:

CUDA driver API error CUDA_ERROR_INVALID_VALUE (1):
invalid argument
Current pipeline object is no longer valid.
"""


@pytest.mark.parametrize(
    ("device", "reason", "is_error"),
    [
        ("cuda", BROKEN, True),
        ("cuda", "Codec configuration not supported on this GPU. Codec: VP9", False),
        ("cpu", BROKEN, False),
    ],
)
def test_a_broken_decoder_of_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, reason: str, is_error: bool
) -> None:
    """Refuse to decode everything on the host where NVDEC is broken, as on an H200 in a virtual machine; not without a codec."""

    def fail(*_: object) -> NDArray[np.uint8]:
        raise RuntimeError(reason)

    monkeypatch.setattr("pipelines.loading.dali_support._dali_frame", fail)
    manifest = write_clips(tmp_path, ["vp9"])
    if is_error:
        message = (
            r"video decoder of cuda: vp9 \(CUDA .*_INVALID_VALUE \(1\): invalid argument\)\. Fix: .*pipeline=torch"
        )
        with pytest.raises(DaliError, match=message):
            choose_feed(manifest, torch.device(device))
    else:
        assert choose_feed(manifest, torch.device(device)).kind == FRAMES


@pytest.mark.parametrize("codec", ["h264", "mpeg4"])
def test_turned_videos(tmp_path: Path, device: torch.device, codec: str) -> None:
    """Cut the same integer rectangle from the upright frame, although DALI's decoder returns frames as stored."""
    rows = []
    for number, degrees in enumerate((0, 90, 180, 270, 90, 0)):
        _, encoder, pix_fmt = ENCODERS[codec]
        path = turned(write_video(tmp_path / f"{number}.mp4", video(number), encoder, pix_fmt), degrees)
        rows.append(ManifestRow(path.name, 0, label=0, **asdict(scan_clip(path))))
    assert sorted({row.rotation for row in rows}) == [0, 90, 180, 270]
    write_manifest(tmp_path / "train.arrow", rows, ["a"])
    check_alike(*both(training(tmp_path / "train.arrow"), positions(6, 2), device))
    check_alike(*both(evaluation(tmp_path / "train.arrow", 3), evaluation_rows(CLIPS, 3, 0, 1), device))


def test_a_video_that_is_turned_by_half_a_right_angle_is_as_bad_as_for_the_host(tmp_path: Path) -> None:
    """Reject a rotation of 45 degrees as the host does: its crop would lie elsewhere, partly outside the frame."""
    rows = [write_clip(tmp_path, number, "vp9") for number in range(CLIPS)]
    rows[2] = replace(rows[2], rotation=45)
    write_manifest(tmp_path / "train.arrow", rows, ["a", "b"])
    ours, theirs = both(training(tmp_path / "train.arrow"), positions(4, 3))
    check_alike(ours, theirs)
    assert {record.row for batch in ours for record in batch.bad_clips} == {2}


@given(st.integers(0, 3), st.data())
def test_the_window_of_a_turned_frame(turns: int, data: st.DataObject) -> None:
    """Cropping the stored frame and rotating gives the same pixels as rotating and cropping."""
    height, width = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    stored_HW = np.arange(height * width).reshape(height, width)
    upright_HW = np.rot90(stored_HW, turns)
    high, wide = (data.draw(st.integers(1, side)) for side in upright_HW.shape)
    top = data.draw(st.integers(0, upright_HW.shape[0] - high))
    left = data.draw(st.integers(0, upright_HW.shape[1] - wide))
    expected_HW = upright_HW[top : top + high, left : left + wide]
    params = SampleParams(np.zeros(1, np.int64), left, top, wide, high, flip=False)
    t, l, h, w = stored_window(params, turns, height, width)  # noqa: E741
    assert np.array_equal(np.rot90(stored_HW[t : t + h, l : l + w], turns), expected_HW)


# --- Loader -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of VP9 clips, which every DALI version decodes on the CPU."""
    return write_clips(tmp_path_factory.mktemp("dali"), ["vp9"]).parent


@pytest.fixture
def manifest(made: Path, tmp_path: Path) -> Path:
    """The manifest of a copy that a test may damage."""
    shutil.copytree(made, tmp_path / "clips")
    return tmp_path / "clips" / "train.arrow"


def test_resumed_in_the_middle_of_an_epoch_to_the_bit(made: Path, device: torch.device) -> None:
    loader = DaliLoader(training(made / "train.arrow"), 0, 2, device, 2)
    whole, rest = (list(loader.batches(batch_indices)) for batch_indices in (positions(5, 4), positions(3, 4, first=2)))
    for ours, theirs in zip(whole[2:], rest, strict=True):
        check_same_clips(ours, theirs)
        assert torch.equal(ours.video_NTCHW, theirs.video_NTCHW)


def test_processes_that_read_change_nothing(made: Path, device: torch.device) -> None:
    alone, read = (
        list(DaliLoader(training(made / "train.arrow"), workers, 2, device, 1).batches(positions(6, 2)))
        for workers in (0, 2)
    )
    for ours, theirs in zip(alone, read, strict=True):
        check_same_clips(ours, theirs)
        assert torch.equal(ours.video_NTCHW, theirs.video_NTCHW)


def test_no_batch_indices(made: Path) -> None:
    assert list(DaliLoader(training(made / "train.arrow"), 0, 2, CPU, 1).batches([])) == []


def test_ranks_see_each_clip_once_in_as_many_steps(made: Path) -> None:
    """Give 2 ranks with 3 clips per step the same clips as 1 rank with 6."""
    loader = DaliLoader(training(made / "train.arrow"), 0, 2, CPU, 1)
    whole = list(loader.batches(positions(4, 6)))
    halves = [list(loader.batches([step[rank * 3 : rank * 3 + 3] for step in positions(4, 6)])) for rank in range(2)]
    assert len(halves[0]) == len(halves[1]) == len(whole) == 4
    for batch, *parts in zip(whole, *halves, strict=True):
        assert torch.equal(torch.cat([part.video_NTCHW for part in parts]), batch.video_NTCHW)
        assert torch.equal(torch.cat([part.row_N for part in parts]), batch.row_N)


def test_nothing_of_a_loader_is_left_after_its_last_batch(made: Path) -> None:
    """Free threads and files after the last batch, and also when iteration stops early.

    Each evaluation builds its own pipeline, with threads and, on a GPU, device memory.
    """

    def threads_and_files() -> tuple[int, int]:
        return len(list(Path("/proc/self/task").iterdir())), len(list(Path("/proc/self/fd").iterdir()))

    loader = DaliLoader(training(made / "train.arrow"), 0, 2, CPU, 2)
    list(loader.batches(positions(3, 2)))
    before = threads_and_files()
    # Resources must be freed without the cyclic GC, which runs at an unknown time.
    gc.disable()
    try:
        for _ in range(3):
            list(loader.batches(positions(3, 2)))
            next(loader.batches(positions(9, 2)))
        assert threads_and_files() == before
    finally:
        gc.enable()


# --- Broken clips -----------------------------------------------------------------------------------------------------


def row_in_batch(batch_indices: list[NDArray[np.int64]], batch: int) -> int:
    """Return a row that first occurs in this batch."""
    rows = [StreamOrder(CLIPS, SEED).at(positions_N)[1].tolist() for positions_N in batch_indices]
    return next(row for row in rows[batch] if all(row not in earlier for earlier in rows[:batch]))


def cut(path: Path) -> None:
    os.truncate(path, 100)


def overwrite(path: Path) -> None:
    """Overwrite a file with as many bytes that are no video."""
    path.write_bytes(b"\xa5" * path.stat().st_size)


@pytest.mark.parametrize("spoil", [Path.unlink, cut, overwrite])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_clip_is_replaced_and_the_rest_goes_on(manifest: Path, spoil: object, workers: int) -> None:
    batch_indices = positions(6, 2)
    row = row_in_batch(batch_indices, 1)
    # The feed is chosen before the damage, as in a run.
    choose_feed(manifest, CPU)
    spoil(manifest.parent / f"{row}.webm")  # type: ignore[operator]
    ours, theirs = both(training(manifest), batch_indices, workers=workers)
    check_alike(ours, theirs)
    bad = [record for batch in ours for record in batch.bad_clips]
    assert bad and {record.row for record in bad} == {row}


def test_a_video_of_fewer_frames_than_the_manifest_says(tmp_path: Path) -> None:
    """Reject a video with fewer frames than its manifest row: DALI would pad it, and FFmpeg must find the end too."""
    rows = [write_clip(tmp_path, number, "vp9") for number in range(CLIPS)]
    rows[2] = replace(rows[2], num_frames=400)
    write_manifest(tmp_path / "train.arrow", rows, ["a", "b"])
    ours, theirs = both(training(tmp_path / "train.arrow"), positions(4, 3))
    check_alike(ours, theirs)
    assert {record.row for batch in ours for record in batch.bad_clips} == {2}


def test_frames_of_another_size_than_the_manifest_says(tmp_path: Path) -> None:
    rows = [write_clip(tmp_path, number, "vp9") for number in range(CLIPS)]
    rows[2] = replace(rows[2], width=rows[2].width + 8, height=rows[2].height + 8)
    write_manifest(tmp_path / "train.arrow", rows, ["a", "b"])
    ours, theirs = both(training(tmp_path / "train.arrow"), positions(4, 3))
    check_alike(ours, theirs)
    assert {record.row for batch in ours for record in batch.bad_clips} == {2}


def test_an_evaluation_says_what_is_missing(manifest: Path) -> None:
    choose_feed(manifest, CPU)
    overwrite(manifest.parent / "3.webm")
    cut(manifest.parent / "4.webm")
    ours, theirs = both(evaluation(manifest), evaluation_rows(CLIPS, 2, 0, 1))
    check_alike(ours, theirs)
    assert [record.row for batch in ours for record in batch.bad_clips] == [3, 4]
    assert torch.cat([batch.real_N for batch in ours]).tolist() == [True, True, True, False, False, True]


def test_dali_that_fails_with_good_clips_is_an_error(tmp_path: Path) -> None:
    """Raise when DALI fails on good clips, instead of training at the speed of one decoding process.

    The manifest lists MPEG-4 files as VP9. DALI fails on them, but the host decodes them.
    """
    rows = [write_clip(tmp_path, number, "vp9" if number == 0 else "mpeg4") for number in range(CLIPS)]
    write_manifest(tmp_path / "train.arrow", [replace(row, codec="vp9", fast_seek=True) for row in rows], ["a", "b"])
    loader = DaliLoader(training(tmp_path / "train.arrow"), 0, 2, CPU, 1)
    with pytest.raises(
        DaliError, match="DALI failed on 3 batches in a row in which no clip is bad: .*Failed to create video decoder"
    ) as caught:
        list(loader.batches(positions(12, 2)))
    assert "Fix: pipeline=torch" in str(caught.value)


def test_a_reading_process_that_is_killed_is_an_error(made: Path) -> None:
    batches = DaliLoader(training(made / "train.arrow"), 1, 2, CPU, 1).batches(positions(100_000, 2))
    next(batches)
    threading.Timer(0.3, lambda: os.kill(_newest_worker(), signal.SIGKILL)).start()
    began_s = time.monotonic()
    with pytest.raises(WorkerLostError, match="a decoding worker process was killed"):
        list(islice(batches, 10_000))
    assert time.monotonic() - began_s < 30


def _newest_worker() -> int:
    """Return the pid of the loader's newest worker, a child of the fork server."""
    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return int(Path(f"/proc/{server}/task/{server}/children").read_text().split()[-1])


# --- A whole job, and another DALI version ----------------------------------------------------------------------------

JOB = (
    "experiment=smoke pipeline=dali pipeline.workers=1 logger=disabled logger.every_steps=1 pipeline.size=32 model.num_frames=4 "
    "batch.global_batch=8 batch.bn_group=4 schedule.epochs=2 schedule.warmup_epochs=0 numerics.deterministic=true max_steps=5"
).split()


@pytest.mark.slow
def test_a_job_over_horovod_that_is_stopped_and_resumed_to_the_bit(tmp_path: Path) -> None:
    world = World("horovodrun", 2)
    clips = make_clips(tmp_path / "clips")
    arguments = [*JOB, f"data.root={clips}", f"outputs={tmp_path}"]

    def run(run_id: str, *more: str) -> str:
        ended = start_training(world, tmp_path / f"{run_id}.txt", *arguments, f"run_id={run_id}", *more).wait(180)
        assert ended.exit_code == 0, ended.output[-3000:]
        return ended.output

    said = run("whole", "checkpoint.every_steps=3")
    assert f"input      DALI {import_dali().__version__}" in said and "h264" in said
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for later in (tmp_path / "resumed" / "checkpoints").glob("step-0000000[45]"):
        shutil.rmtree(later)
    assert "resuming resumed from step 3" in run("resumed", "checkpoint.every_steps=3")
    assert differing(tmp_path / "whole", tmp_path / "resumed", 5) == []


@pytest.fixture(scope="session")
def other_version() -> Iterator[Path]:
    try:
        yield fetch_dali()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no DALI {VERSION} from pip: {error}")


@pytest.mark.slow
@pytest.mark.skipif("TSM_OTHER_DALI" in os.environ, reason="this is that run")
def test_all_of_this_with_a_version_that_does_not_know_h264(other_version: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-m", "not slow and not gpu"]
    environment = {**os.environ, "PYTHONPATH": str(other_version), "TSM_OTHER_DALI": VERSION}
    environment.pop("FORBID_SKIPS", None)
    ended = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-2000:]


def test_the_version_that_is_asked_for() -> None:
    wanted = os.environ.get("TSM_OTHER_DALI")
    assert wanted in (None, import_dali().__version__)
