"""Generate the shapes: clips as pure functions of their index, twins in reverse order, and an interruptible write."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import BadClip
from pipelines.manifest import Manifest
from pipelines.prepare.errors import DataSetError
from pipelines.prepare.scan.scan_clip import scan_clip
from pipelines.prepare.shapes import write as shapes
from pipelines.prepare.shapes.drawing import CLASSES, ORDER_GROUPS, class_of, draw_clip, encode_clip
from pipelines.prepare.shapes.write import GeneratedConfig, write_generated
from runtime.atomic_write import atomic_write

CHECKOUT = Path(__file__).parents[3]
SMALL = GeneratedConfig(train_clips=20, val_clips=10, size=32, frames=(8, 24))
COMMAND = [sys.executable, str(CHECKOUT / "prepare.py"), "shapes"]
SMALL_ARGUMENTS = ["--train-clips", "20", "--val-clips", "10", "--size", "32", "--frames", "8", "24"]


def decode(content: bytes) -> np.ndarray:
    with av.open(io.BytesIO(content), "r") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.glob("**/*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes") / "shapes"
    write_generated(root, SMALL)
    return root


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished folder that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "shapes"))


# ---------------------------------------------------------------------------------------------------------------- the clips


@settings(max_examples=15)
@given(split=st.sampled_from(["train", "val"]), seed=st.integers(0, 2**40), index=st.integers(0, 2**40))
def test_a_clip_is_a_pure_function_of_its_index(split: str, seed: int, index: int) -> None:
    first_THWC, again_THWC = (draw_clip(split, seed, index, 32, (8, 16)) for _ in range(2))
    assert first_THWC.shape in ((8, 32, 32, 3), (16, 32, 32, 3)) and first_THWC.dtype == np.uint8
    assert np.array_equal(first_THWC, again_THWC)
    assert encode_clip(first_THWC) == encode_clip(again_THWC)


@settings(max_examples=15)
@given(seed=st.integers(0, 2**40), drawing=st.integers(0, 2**40))
def test_twins_are_reversed_also_once_encoded(seed: int, drawing: int) -> None:
    """Reverse the decoded pixels of twins too, so that no network can read the order from encoder artefacts."""
    forward_THWC, backward_THWC = (draw_clip("train", seed, 2 * drawing + twin, 48, (8, 24)) for twin in range(2))
    assert np.array_equal(forward_THWC[::-1], backward_THWC)
    assert not np.array_equal(forward_THWC, backward_THWC)
    assert np.array_equal(decode(encode_clip(forward_THWC))[::-1], decode(encode_clip(backward_THWC)))
    forward, backward = class_of(2 * drawing), class_of(2 * drawing + 1)
    assert backward == forward + 1 and ORDER_GROUPS[forward] == ORDER_GROUPS[backward]


def test_a_longer_gop_would_give_the_order_away() -> None:
    """Show that the test above can fail: with predicted frames the decoded pixels of twins differ."""
    forward_THWC, backward_THWC = draw_clip("train", 0, 0), draw_clip("train", 0, 1)
    forward_THWC, backward_THWC = (
        decode(encode_clip(video_THWC, gop=12)) for video_THWC in (forward_THWC, backward_THWC)
    )
    assert not np.array_equal(forward_THWC[::-1], backward_THWC)


@pytest.mark.parametrize("index", range(0, 10, 2))
def test_a_clip_shows_its_class(index: int) -> None:
    """Measure position, area and strength of the shape on the mask of saturated pixels."""
    for drawing in range(index, index + 200, 10):
        video_THWC = draw_clip("val", 3, drawing).astype(float)
        saturation_THW = video_THWC.max(-1) - video_THWC.min(-1)
        mask_THW = np.where(saturation_THW > 70, saturation_THW, 0.0)
        first_HW, last_HW = mask_THW[0], mask_THW[-1]
        y_HW, x_HW = np.mgrid[:64, :64]
        if CLASSES[class_of(index)] == "move_right":
            assert (last_HW * x_HW).sum() / last_HW.sum() - (first_HW * x_HW).sum() / first_HW.sum() > 20
        elif CLASSES[class_of(index)] == "move_down":
            assert (last_HW * y_HW).sum() / last_HW.sum() - (first_HW * y_HW).sum() / first_HW.sum() > 20
        elif CLASSES[class_of(index)] == "grow":
            assert (last_HW > 0).sum() > 2 * (first_HW > 0).sum()
        elif CLASSES[class_of(index)] == "appear":
            assert last_HW.sum() > 3 * first_HW.sum()
        else:
            # A rotating shape keeps its area and its position.
            assert 0.7 < (last_HW > 0).sum() / (first_HW > 0).sum() < 1.4


def test_splits_and_seeds_share_no_clip() -> None:
    drawn = [
        draw_clip(split, seed, index, 32, (8,)).tobytes()
        for split in shapes.SPLITS
        for seed in (0, 1)
        for index in range(40)
    ]
    assert len(set(drawn)) == len(drawn)


def test_quality_is_the_same_in_every_frame() -> None:
    """Encode every frame with the same error, so that the first frame of a clip is no sharper than the others."""
    error_NT = []
    # Moving discs: the encoder's task is the same in every frame of the clip.
    for index in range(0, 200, 10):
        video_THWC = draw_clip("train", 0, index, 64, (24,))
        decoded_THWC = decode(encode_clip(video_THWC))
        error_NT.append(np.abs(decoded_THWC.astype(float) - video_THWC).mean(axis=(1, 2, 3)))
    error_T = np.mean(error_NT, axis=0)
    assert error_T.max() / error_T.min() < 1.05


# ------------------------------------------------------------------------------------------------------------------ scanning


def test_scan_reports_what_is_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(encode_clip(draw_clip("train", 0, 0, 48, (17,)), gop=12))
    facts = scan_clip(path)
    assert (facts.length, facts.num_frames, facts.codec) == (path.stat().st_size, 17, "h264")
    assert (facts.width, facts.height, facts.rotation) == (48, 48, 0)


def test_scan_refuses_what_does_not_decode(tmp_path: Path) -> None:
    content = encode_clip(draw_clip("train", 0, 0, 48, (16,)))
    empty, text, cut, sound = (tmp_path / name for name in ("empty.mp4", "text.mp4", "cut.mp4", "sound.wav"))
    empty.write_bytes(b"")
    text.write_text("not a video\n" * 1000)
    cut.write_bytes(content[: len(content) // 2])
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        samples.sample_rate = 8000
        container.mux(stream.encode(samples))
    for path, why in [
        (tmp_path / "none.mp4", "no such file"),
        (empty, "empty"),
        (text, "does not decode"),
        (cut, "does not decode"),
        (sound, "no video stream"),
        (tmp_path, "not a regular file"),
    ]:
        with pytest.raises(BadClip, match=rf"{path.name}.*({why})"):
            scan_clip(path)


# ---------------------------------------------------------------------------------------------------------------- the folder


def test_the_folder_holds_what_its_manifests_say(finished: Path) -> None:
    for split, clips in (("train", 20), ("val", 10)):
        manifest = Manifest.open(finished / f"{split}.arrow")
        assert (manifest.classes, manifest.order_groups, manifest.split) == (CLASSES, ORDER_GROUPS, split)
        assert Counter(manifest.labels().tolist()) == dict.fromkeys(range(10), clips // 10)
        for index in range(clips):
            row = manifest.row(index)
            assert row.path == f"{split}/{CLASSES[row.label]}/{index:06d}.mp4" and row.label == class_of(index)
            content = (finished / row.path).read_bytes()
            video_THWC = draw_clip(split, 0, index, 32, (8, 24))
            assert content == encode_clip(video_THWC)
            assert (row.length, row.num_frames, row.codec) == (len(content), len(video_THWC), "h264")
    assert json.loads((finished / "dataset.json").read_text())["train_clips"] == 20


def test_many_workers_write_the_same(finished: Path, tmp_path: Path) -> None:
    command = [*COMMAND, *SMALL_ARGUMENTS, "--root", str(tmp_path / "shapes"), "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "20 train and 10 val clips of 10 classes" in done.stdout and "30 clips written" in done.stdout
    assert "train: 20 of 20 clips" in done.stderr
    assert contents(tmp_path / "shapes") == contents(finished)


def test_a_second_call_leaves_the_folder_alone(root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.glob("**/*")}
    start_s = time.perf_counter()
    written = write_generated(root, SMALL)
    assert time.perf_counter() - start_s < 1.0
    assert (written.new_clips, written.rows) == (0, {"train": 20, "val": 10})
    assert {path: path.stat().st_mtime_ns for path in root.glob("**/*")} == before
    done = subprocess.run([*COMMAND, *SMALL_ARGUMENTS, "--root", str(root)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "already complete" in done.stdout


def test_what_was_harmed_is_mended(root: Path, finished: Path) -> None:
    clips = sorted(root.glob("train/*/*.mp4"))
    clips[0].unlink()
    clips[1].write_bytes(b"")
    clips[2].write_bytes(clips[2].read_bytes()[:-400])
    (root / "val.arrow").write_bytes((root / "val.arrow").read_bytes()[:-10])
    (clips[3].parent / "000123.mp4.tmp").write_bytes(b"left over")
    assert write_generated(root, SMALL).new_clips == 3
    assert contents(root) == contents(finished)


def test_a_changed_manifest_is_written_again(root: Path, finished: Path) -> None:
    path = root / "train.arrow"
    content, labels = path.read_bytes(), Manifest.open(path).labels()
    path.write_bytes(content.replace(labels.tobytes(), labels[::-1].tobytes()))
    assert path.read_bytes() != content
    assert write_generated(root, SMALL).new_clips == 0
    assert contents(root) == contents(finished)


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    arguments = ["--train-clips", "240", "--val-clips", "10", "--size", "32", "--frames", "8", "--workers", "2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = subprocess.Popen(
        [*COMMAND, *arguments, "--root", str(killed)], start_new_session=True, stderr=subprocess.DEVNULL
    )
    wait_until(lambda: len(list(killed.glob("train/*/*.mp4"))) >= 30)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # The workers of the killed process end as well.
    wait_until(lambda: not living_members(process.pid))
    kept = {path: path.stat().st_mtime_ns for path in killed.glob("train/*/*.mp4")}
    assert 30 <= len(kept) < 240 and not (killed / "train.arrow").exists()

    config = GeneratedConfig(train_clips=240, val_clips=10, size=32, frames=(8,))
    assert write_generated(killed, config).new_clips == 250 - len(kept)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    write_generated(whole, config)
    assert contents(killed) == contents(whole)


def wait_until(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    start_s = time.monotonic()
    while not condition():
        assert time.monotonic() - start_s < limit_s, "waited in vain"
        time.sleep(0.005)


def living_members(group: int) -> list[str]:
    """Return the process ids of a process group, without zombies."""
    members = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = status.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(process_group) == group and state not in "ZX":
            members.append(status.parent.name)
    return members


def test_other_parameters_need_force(root: Path, tmp_path: Path) -> None:
    (root / "notes.txt").write_text("mine")
    before = contents(root)
    other = GeneratedConfig(train_clips=10, val_clips=10, size=32, frames=(8, 24), seed=5)
    with pytest.raises(DataSetError, match=r"train_clips is 20, not 10; seed is 0, not 5.*--root.*--force"):
        write_generated(root, other)
    assert contents(root) == before
    assert write_generated(root, other, force=True).new_clips == 20
    write_generated(tmp_path / "fresh", other)
    assert contents(root) == contents(tmp_path / "fresh") | {"notes.txt": b"mine"}


def test_a_folder_of_something_else_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.mp4").write_bytes(b"precious")
    for force in (False, True):
        with pytest.raises(DataSetError, match=r"not empty and has no dataset.json.*--root"):
            write_generated(tmp_path, SMALL, force=force)
    (tmp_path / "dataset.json").write_text('{"dataset": "kinetics"}')
    with pytest.raises(DataSetError, match=r"not written by prepare.py shapes.*--root"):
        write_generated(tmp_path, SMALL, force=True)
    assert sorted(contents(tmp_path)) == ["dataset.json", "train/mine.mp4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train-clips", "15"], "--train-clips is 15. Fix: give a positive multiple of 10"),
        (["--val-clips", "0"], "--val-clips is 0"),
        (["--size", "63"], "--size is 63"),
        (["--frames", "24", "4"], "--frames is [24, 4]"),
        (["--seed", "-1"], "--seed is -1"),
        (["--workers", "0"], "--workers is 0"),
        (["--root", "{file}/shapes"], "Not a directory"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import prepare

    (tmp_path / "file").write_text("")
    arguments = [argument.format(file=tmp_path / "file") for argument in arguments]
    assert prepare.main(["shapes", "--root", str(tmp_path / "shapes"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "shapes").exists()


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def fill_up(path: Path, durable: bool) -> Iterator[BinaryIO]:
        if "000005" in path.name:
            raise OSError(28, os.strerror(28))
        with atomic_write(path, durable) as file:
            yield file

    monkeypatch.setattr(shapes, "atomic_write", fill_up)
    with pytest.raises(
        DataSetError, match=r"cannot write .*000005.mp4: No space left on device. Fix: free space there"
    ):
        write_generated(tmp_path / "shapes", SMALL)
    monkeypatch.undo()
    assert write_generated(tmp_path / "shapes", SMALL).new_clips == 25


def test_importing_needs_no_torch() -> None:
    code = "import sys, prepare; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, check=True, timeout=60)
