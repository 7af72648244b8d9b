"""A file system that fails is waited for, and never makes a clip bad. The kernel raises the errors here (EIO)."""

import gc
import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pipelines.decoding import storage_faults
from pipelines.decoding.decode import decode_clip
from pipelines.errors import BadClip, StorageFault
from pipelines.loading.clips import ClipSource, EvaluationClips, TrainingClips
from pipelines.loading.worker_loader import ClipLoader
from pipelines.manifest import Manifest, ManifestRow, write_manifest
from pipelines.prepare.scan.frame_folders import scan_frames
from pipelines.prepare.scan.scan_clip import scan_clip
from pipelines.stream.augmentation import Augmentation
from pipelines.stream.eval_views import EvalProtocol
from tests.helpers.clips import smooth_video, write_frames, write_mp4

BATCH = (np.arange(2), np.ones(2, dtype=bool))
CLIPS = ["video.mp4", "frames"]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """A video and a folder of frames."""
    video, frames = (
        write_mp4(tmp_path / "video.mp4", smooth_video(8)),
        write_frames(tmp_path / "frames", smooth_video(8)),
    )
    series, facts = scan_frames(frames)
    rows = [
        ManifestRow("video.mp4", 0, label=0, **vars(scan_clip(video))),
        ManifestRow(f"frames/{series.pattern}", series.first, label=1, **vars(facts)),
    ]
    write_manifest(tmp_path / "val.arrow", rows, ["a", "b"])
    return tmp_path / "val.arrow"


def clips_of(manifest: Path, retry_s: float) -> EvaluationClips:
    return EvaluationClips(ClipSource(manifest, "pyav", retry_s), EvalProtocol(8, 32))


def files_of(clip: Path) -> list[Path]:
    return sorted(clip.iterdir()) if clip.is_dir() else [clip]


def break_reads(clip: Path) -> Callable[[], None]:
    """Let the kernel fail to read a clip's files; returns a function that repairs them."""
    files = files_of(clip)
    for path in files:
        path.rename(path.with_name(f"{path.name}.aside"))
        # Nothing is mapped at address 0, where a read of this file begins.
        path.symlink_to("/proc/self/mem")

    def repair() -> None:
        for path in files:
            path.with_name(f"{path.name}.aside").replace(path)

    return repair


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("training", [False, True])
def test_a_read_error_is_no_bad_clip(manifest: Path, name: str, training: bool) -> None:
    break_reads(manifest.parent / name)
    evaluated = clips_of(manifest, retry_s=0)
    trained = TrainingClips(evaluated.source, Augmentation(8, 32), 0)
    read = partial(trained.__getitem__, np.arange(2)) if training else partial(evaluated.__getitem__, BATCH)
    with pytest.raises(StorageFault, match=rf"{name}.*: Input/output error, for 0 s: .*Fix: .*data\.retry_s"):
        read()


@pytest.mark.parametrize("name", CLIPS)
def test_a_file_system_that_comes_back_costs_no_bit(
    manifest: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = clips_of(manifest, retry_s=60)
    expected = clips[BATCH].video_NTCHW
    repair = break_reads(manifest.parent / name)
    waits: list[float] = []

    def sleep(wait_s: float) -> None:
        waits.append(wait_s)
        if len(waits) == 3:
            repair()

    monkeypatch.setattr(storage_faults.time, "sleep", sleep)
    batch = clips[BATCH]
    assert batch.bad_clips == () and batch.video_NTCHW.equal(expected) and waits == [0.5, 1.0, 2.0]
    assert capsys.readouterr().err.count("Input/output error; trying again in") == 3


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("damage", ["missing", "empty", "garbage"])
def test_a_bad_clip_stays_one_and_is_not_waited_for(manifest: Path, name: str, damage: str) -> None:
    for path in files_of(manifest.parent / name):
        length = path.stat().st_size
        path.unlink()
        if damage != "missing":
            path.write_bytes(b"" if damage == "empty" else b"x" * length)
    batch = clips_of(manifest, retry_s=3600)[BATCH]
    assert [record.row for record in batch.bad_clips] == [CLIPS.index(name)]


@pytest.mark.parametrize("name", CLIPS)
def test_a_bad_clips_error_is_freed_without_the_garbage_collector(manifest: Path, name: str) -> None:
    """Its traceback leads to the frames of its readers, whose tensors would stay in shared memory."""
    for path in files_of(manifest.parent / name):
        path.write_bytes(b"x" * path.stat().st_size)
    source, row = clips_of(manifest, retry_s=0).source, Manifest.open(manifest).row(CLIPS.index(name))
    gc.collect()
    gc.disable()
    try:
        with suppress(BadClip):
            read_and_hold(source, row)
        assert held.pop()() is None
    finally:
        gc.enable()


held: list[weakref.ref[BadClip]] = []


def read_and_hold(source: ClipSource, row: ManifestRow) -> None:
    """Read a clip, and keep a weak reference to its error."""
    try:
        storage_faults.read_patiently(
            lambda: decode_clip(source.decoder, source.manifest.root, row, np.arange(8)), source.manifest.root, row, 0
        )
    except BadClip as error:
        held.append(weakref.ref(error))
        raise


def test_a_pipe_without_a_writer_is_not_waited_for(manifest: Path) -> None:
    path = manifest.parent / "video.mp4"
    path.unlink()
    os.mkfifo(path)
    assert [record.row for record in clips_of(manifest, retry_s=3600)[BATCH].bad_clips] == [0]


@pytest.mark.slow
def test_a_worker_passes_the_fault_on_without_its_traceback(manifest: Path) -> None:
    break_reads(manifest.parent / "video.mp4")
    with pytest.raises(StorageFault) as caught:
        list(ClipLoader(clips_of(manifest, retry_s=0), 1, 1).batches([BATCH]))
    assert str(caught.value).startswith(f"{manifest.parent / 'video.mp4'}: Input/output error, for 0 s")


def test_faults_of_shards_are_seen_too(manifest: Path, tmp_path: Path) -> None:
    """A row in a shard that is longer than the file system lets it be read."""
    row = Manifest.open(manifest).row(0)
    in_shard = ManifestRow(**{**vars(row), "path": "x.tar", "offset": 512})
    (tmp_path / "x.tar").symlink_to("/proc/self/mem")

    def read() -> None:
        raise BadClip("x.tar: damaged")

    with pytest.raises(StorageFault, match=r"x\.tar: Input/output error"):
        storage_faults.read_patiently(read, tmp_path, in_shard, 0)
