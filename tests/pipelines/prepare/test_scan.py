"""Scan many files: processes that die, the resumable journal, limits on bad clips, and the resulting manifests."""

import csv
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prepare
from pipelines.errors import BadClip
from pipelines.jpeg_clips import JPEG_COLOURS, JPEG_FRAMES
from pipelines.manifest import Manifest
from pipelines.prepare.annotations.base import Annotations, Clip
from pipelines.prepare.errors import DataSetError
from pipelines.prepare.scan.frame_folders import FrameSeries, find_frames, scan_frames
from pipelines.prepare.scan.scan_clip import ClipFacts, scan_clip
from pipelines.prepare.scan.scan_journal import Scanned, open_journal
from pipelines.prepare.scan.write_manifests import BAD_FILES_NAME, JOURNAL_NAME, row_path, scan_one, write_manifests
from pipelines.prepare.worker_pool import Died, run_guarded
from tests.helpers.clips import plain_video, smooth_video, turned, write_frames, write_mp4, write_video
from tests.helpers.flock import break_flock
from tests.helpers.scan_faults import die_on_bad, fail

CHECKOUT = Path(__file__).resolve().parents[3]
PREPARE = [sys.executable, str(CHECKOUT / "prepare.py")]


# --- Processes that may die -------------------------------------------------------------------------------------------


def test_every_item_comes_back_once() -> None:
    items = [str(number) for number in range(40)]
    found = dict(run_guarded(die_on_bad, [f"a{item}" for item in items], 3, "scanning"))
    assert found == {index: f"A{item}" for index, item in enumerate(items)}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_process_that_dies_costs_its_item_only(workers: int, tmp_path: Path) -> None:
    items = ["a", "kill", "b", f"once {tmp_path / 'mark'}", "segfault", "c", "exit", "d"]
    found = list(run_guarded(die_on_bad, items, workers, "scanning"))
    assert sorted(index for index, _ in found) == list(range(len(items)))
    results = dict(found)
    died = {items[index]: result.how for index, result in results.items() if isinstance(result, Died)}
    assert died == {"kill": "signal 9, Killed", "segfault": "signal 11, Segmentation fault", "exit": "exit code 7"}
    # The second attempt succeeded.
    assert results[3] == items[3].upper()
    assert [results[index] for index in (0, 2, 5, 7)] == ["A", "B", "C", "D"]


def test_a_fault_of_the_program_is_none_of_the_file() -> None:
    with pytest.raises(RuntimeError, match="scanning raise failed: ValueError: a fault of the program"):
        list(run_guarded(die_on_bad, ["raise"], 1, "scanning"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of one video per split as `files`, and the same in `shards`."""
    root = tmp_path_factory.mktemp("prepared")
    write_mp4(root / "files" / "train" / "one" / "0.mp4", smooth_video(9))
    write_mp4(root / "files" / "val" / "one" / "0.mp4", smooth_video(9))
    assert prepare.main(["folder", "--root", str(root / "files"), "--workers", "0"]) == 0
    assert prepare.main(["shard", "--root", str(root / "files"), "--to", str(root / "shards"), "--workers", "0"]) == 0
    return root


@pytest.mark.parametrize(
    ("command", "source", "function", "failed"),
    [
        ("folder", "new", "prepare.scan.write_manifests.scan_one", r"scanning \S*/new/train/one/0\.mp4"),
        ("transcode", "files", "prepare.repack.remake.make_clip", r"encoding \S*/files/train\.arrow, row 0,"),
        ("shard", "files", "prepare.repack.shard.write_shard", r"writing \S*/made/\S+\.tar"),
        ("verify", "files", "prepare.repack.verify.check", r"verifying \S*/files/train\.arrow, rows from 0"),
        ("verify", "shards", "prepare.repack.verify.check", r"verifying \S*/shards/\S+\.tar"),
        ("stage", "shards", "prepare.repack.stage.copy_files", r"copying \S*/shards/\S+\.tar"),
    ],
)
def test_a_fault_of_the_program_names_the_work(
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    source: str,
    function: str,
    failed: str,
) -> None:
    monkeypatch.setattr(f"pipelines.{function}", fail)
    if source == "new":
        shutil.copytree(
            prepared / "files", root := tmp_path / "new", ignore=shutil.ignore_patterns("*.arrow", "*.jsonl")
        )
    else:
        root = prepared / source
    target = [] if command in ("folder", "verify") else ["--to", str(tmp_path / "made")]
    with pytest.raises(RuntimeError, match=rf"^{failed} failed: ValueError: a fault of the program$"):
        prepare.main([command, "--root", str(root), *target, "--workers", "1"])


def test_leaving_early_ends_the_processes(tmp_path: Path) -> None:
    results = run_guarded(die_on_bad, [f"sleep {tmp_path / 'pid'}", "a"], 2, "scanning")
    assert next(results) == (1, "A")
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
    results.close()
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()


def wait_until(condition: Callable[[], object], limit_s: float = 60.0) -> None:
    start_s = time.monotonic()
    while not condition():
        assert time.monotonic() - start_s < limit_s, "waited in vain"
        time.sleep(0.01)


# --- The journal ------------------------------------------------------------------------------------------------------

GOOD = Scanned("a.mp4", 10, 20, ClipFacts(10, 4, "h264", 48, 32, 0, "bt709", "tv"))
BAD = Scanned("b é.mp4", 11, 21, reason="b é.mp4: does not decode")
FRAMES = Scanned("c", 12, 22, ClipFacts(12, 4, JPEG_FRAMES, 48, 32, 0, *JPEG_COLOURS), pattern="%05d.jpg", first=1)


def test_the_journal_keeps_the_newest_record(tmp_path: Path) -> None:
    path = tmp_path / "scan.jsonl"
    newer = replace(GOOD, mtime_ns=99)
    for records in ([GOOD, BAD], [FRAMES, newer]):
        with open_journal(path) as (_, journal):
            for record in records:
                journal.add(record)
    with open_journal(path) as (known, _):
        assert known == {"a.mp4": newer, "b é.mp4": BAD, "c": FRAMES}


def test_what_may_have_been_a_passing_fault_is_not_remembered(tmp_path: Path) -> None:
    with open_journal(tmp_path / "scan.jsonl") as (_, journal):
        journal.add(Scanned("gone.mp4", 0, 0, reason="no such file", missing=True))
        journal.add(Scanned("died.mp4", 0, 0, reason="the process died"))
    assert (tmp_path / "scan.jsonl").read_text() == ""


@pytest.mark.parametrize("cut", [1, 5, 60])
def test_the_cut_last_line_of_a_killed_scan(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "scan.jsonl"
    with open_journal(path) as (_, journal):
        journal.add(GOOD)
        journal.add(BAD)
    path.write_bytes(path.read_bytes()[:-cut])
    with open_journal(path) as (known, journal):
        assert known == ({"a.mp4": GOOD} if cut > 1 else {"a.mp4": GOOD, BAD.path: BAD})
        journal.add(FRAMES)
    # The new line was not appended to the truncated one.
    with open_journal(path) as (known, _):
        assert known["c"] == FRAMES and known["a.mp4"] == GOOD


def test_records_of_another_version_and_nonsense_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "scan.jsonl"
    with open_journal(path) as (_, journal):
        journal.add(GOOD)
        journal.add(BAD)
    lines = path.read_text().splitlines()
    old = json.loads(lines[0]) | {"version": 0}
    strange = json.loads(lines[0]) | {"colour": "red"}
    path.write_text("\n".join([json.dumps(old), json.dumps(strange), "null", "7", "", "\0\0", lines[1], ""]))
    with open_journal(path) as (known, _):
        assert known == {BAD.path: BAD}


@pytest.mark.parametrize("with_flock", [True, False])
def test_one_scan_at_a_time(tmp_path: Path, with_flock: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_flock:
        break_flock(monkeypatch)
    with open_journal(tmp_path / "scan.jsonl"), pytest.raises(DataSetError, match="is in use: another prepare.py"):
        open_journal(tmp_path / "scan.jsonl").__enter__()


# --- Folders of frames ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "series"),
    [
        ([f"{number:05d}.jpg" for number in (1, 2, 3)], FrameSeries("%05d.jpg", 1, 3)),
        ([f"img_{number:05d}.jpg" for number in (0, 1)], FrameSeries("img_%05d.jpg", 0, 2)),
        ([f"{number}.JPEG" for number in range(12)], FrameSeries("%d.JPEG", 0, 12)),
        ([f"{number:02d}.jpg" for number in range(1, 103)], FrameSeries("%02d.jpg", 1, 102)),
        (["50%_1.jpg", "50%_2.jpg", "thumbs.db", "flow_x_1.jpg", "flow_y_1.jpg"], FrameSeries("50%%_%d.jpg", 1, 2)),
        (["v1_clip2_0001.jpg"], FrameSeries("v1_clip2_%04d.jpg", 1, 1)),
    ],
)
def test_frames_are_found_by_name(tmp_path: Path, names: list[str], series: FrameSeries) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert find_frames(tmp_path) == series


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no JPEG file"),
        (["cover.jpg"], "no JPEG file whose name ends in a number"),
        (["00001.jpg", "00002.jpg", "00004.jpg"], "frame 3 is missing: there is no 00003.jpg"),
        (["00002.jpg", "00003.jpg"], "frame 1 is missing: the first file is 00002.jpg"),
        (["1.jpg", "01.jpg"], "two series of frames?"),
        (["a_1.jpg", "b_2.jpg"], "found b_2.jpg where a_2.jpg was expected"),
    ],
)
def test_frames_that_are_no_series(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(BadClip, match=message.replace("?", "[?]")):
        find_frames(tmp_path)


def test_the_facts_of_frames(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "100% odd", smooth_video(6, 33, 47), first=0)
    series, facts = scan_frames(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert (series, facts) == (FrameSeries("%05d.jpg", 0, 6), ClipFacts(size, 6, JPEG_FRAMES, 47, 33, 0, *JPEG_COLOURS))


def spoil_truncate(folder: Path) -> None:
    os.truncate(folder / "00003.jpg", (folder / "00003.jpg").stat().st_size - 30)


def spoil_size(folder: Path) -> None:
    write_frames(folder, plain_video(1, 32, 40), first=3)


def spoil_kind(folder: Path) -> None:
    Image.new("RGB", (48, 32)).save(folder / "00003.jpg", format="PNG")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_truncate, r"00003.jpg: does not decode \(Image is incomplete or truncated\)"),
        (spoil_size, "00003.jpg is 40x32, the first frame 48x32"),
        (spoil_kind, "00003.jpg: not a JPEG file"),
        (lambda folder: (folder / "00004.jpg").write_bytes(b""), "00004.jpg: the file is empty"),
    ],
)
def test_every_frame_is_decoded(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    folder = write_frames(tmp_path / "clip", plain_video(4))
    spoil(folder)
    with pytest.raises(BadClip, match=message):
        scan_frames(folder)


# --- From annotations to manifests ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen videos of 3 to 18 frames and two folders of frames."""
    root = tmp_path_factory.mktemp("made")
    for number in range(16):
        write_mp4(root / "clips" / f"{number}.mp4", plain_video(3 + number, level=60))
    for number in (16, 17):
        write_frames(root / "clips" / str(number), plain_video(3))
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "data"))


def annotate(root: Path, val: int = 4) -> Annotations:
    """Annotate the clips from the last to the first, so that the list's order differs from that of the names."""
    names = [f"{number}.mp4" for number in range(16)] + ["16", "17"]
    clips = [Clip(root / "clips" / name, index % 2, f"list, line {index}") for index, name in enumerate(names)][::-1]
    return Annotations(["still", "moving"], {"train": clips[val:], "val": clips[:val]})


def test_the_manifest_has_the_annotations_order(root: Path) -> None:
    write_manifests(root, annotate(root), workers=0)
    manifest = Manifest.open(root / "train.arrow")
    found = [manifest.row(index) for index in range(len(manifest))]
    assert [row.path for row in found] == [f"clips/{number}.mp4" for number in range(13, -1, -1)]
    assert [row.label for row in found] == [number % 2 for number in range(13, -1, -1)]
    assert [row.num_frames for row in found] == [3 + number for number in range(13, -1, -1)]
    assert [Manifest.open(root / "val.arrow").row(index).codec for index in range(4)] == [JPEG_FRAMES] * 2 + [
        "h264"
    ] * 2


@pytest.mark.slow
def test_workers_and_this_process_write_the_same(root: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    write_manifests(root, annotate(root), workers=2)
    write_manifests(copy, annotate(copy), workers=0)
    for split in ("train", "val"):
        assert (root / f"{split}.arrow").read_bytes() == (copy / f"{split}.arrow").read_bytes()


def scanned_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Write the manifests and return the names of the clips that were decoded for it."""
    decoded: list[str] = []

    def spy(real: Callable[[Path], object]) -> Callable[[Path], object]:
        def scan(path: Path) -> object:
            decoded.append(path.name)
            return real(path)

        return scan

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.prepare.scan.write_manifests.scan_clip", spy(scan_clip))
        patch.setattr("pipelines.prepare.scan.write_manifests.scan_frames", spy(scan_frames))
        write_manifests(root, annotate(root), workers=0, max_bad=0.5, max_missing=0.5)
    return sorted(decoded)


def test_a_second_start_scans_what_has_changed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(root / "clips" / "5.mp4", 100)
    (root / "clips" / "7.mp4").unlink()
    assert len(scanned_again(root, monkeypatch)) == 17
    before = (root / "train.arrow").read_bytes()
    # The journal holds bad clips too.
    assert scanned_again(root, monkeypatch) == []
    assert (root / "train.arrow").read_bytes() == before

    # Repaired.
    shutil.copyfile(root / "clips" / "4.mp4", root / "clips" / "5.mp4")
    # Added.
    shutil.copyfile(root / "clips" / "4.mp4", root / "clips" / "7.mp4")
    # Possibly changed.
    os.utime(root / "clips" / "9.mp4", ns=(0, 1))
    image = root / "clips" / "17" / "00002.jpg"
    # A changed frame, which leaves the folder's own time as it was.
    image.write_bytes(image.read_bytes())
    assert scanned_again(root, monkeypatch) == ["17", "5.mp4", "7.mp4", "9.mp4"]
    assert {Manifest.open(root / "train.arrow").row(index).num_frames for index in (6, 8)} == {7}


def test_bad_and_missing_clips_are_left_out_and_named(root: Path) -> None:
    os.truncate(root / "clips" / "5.mp4", 100)
    (root / "clips" / "17" / "00002.jpg").unlink()
    (root / "clips" / "7.mp4").unlink()
    reports = write_manifests(root, annotate(root), workers=0, max_bad=0.25, max_missing=0.1)
    assert [len(Manifest.open(root / f"{split}.arrow")) for split in ("train", "val")] == [12, 3]
    with open(root / BAD_FILES_NAME, newline="") as file:
        bad = {row["path"]: (row["split"], row["reason"]) for row in csv.DictReader(file)}
    assert list(bad) == ["clips/5.mp4", "clips/7.mp4", "clips/17"]
    assert "does not decode" in bad["clips/5.mp4"][1] and "no such file" in bad["clips/7.mp4"][1]
    assert bad["clips/17"] == ("val", f"{root}/clips/17: frame 2 is missing: there is no 00002.jpg")
    assert (len(reports["train"].bad), len(reports["train"].missing), len(reports["val"].bad)) == (1, 1, 1)


@pytest.mark.parametrize("name", ["c.mp4", "frames"])
def test_a_pipe_is_no_clip(tmp_path: Path, name: str) -> None:
    """Reject a FIFO before opening it, which would block forever."""
    path = tmp_path / name
    if name == "frames":
        path.mkdir()
    os.mkfifo(path / "00001.jpg" if name == "frames" else path)
    scanned = scan_one((tmp_path, name, None))
    assert "not a regular file" in scanned.reason and scanned.facts is None


def test_only_quarter_turns_are_known(tmp_path: Path) -> None:
    for degrees in (0, 90, 180, 270):
        path = turned(write_mp4(tmp_path / f"{degrees}.mp4", plain_video(4)), degrees)
        # Counter-clockwise.
        assert scan_clip(path).rotation == -degrees % 360
    with pytest.raises(BadClip, match="display matrix .* is not one of the 8"):
        scan_clip(turned(write_mp4(tmp_path / "odd.mp4", plain_video(4)), 45))


@pytest.mark.parametrize(
    ("codec", "options", "colours"),
    [
        ("libx264", {}, ("unknown", "unknown")),
        ("libx264", {"x264-params": "colormatrix=bt709:fullrange=off"}, ("bt709", "tv")),
        ("libx264", {"x264-params": "colormatrix=smpte170m:fullrange=on"}, ("smpte170m", "pc")),
        ("mjpeg", {}, JPEG_COLOURS),
    ],
)
def test_the_colours_are_the_streams(
    tmp_path: Path, codec: str, options: dict[str, str], colours: tuple[str, str]
) -> None:
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    facts = scan_clip(write_video(tmp_path / "a.mp4", plain_video(2), codec, pix_fmt, options))
    assert (facts.colour_space, facts.colour_range) == colours


def test_too_many_bad_clips_write_nothing(root: Path) -> None:
    write_manifests(root, annotate(root), workers=0)
    before = (root / "train.arrow").read_bytes()
    os.truncate(root / "clips" / "5.mp4", 100)
    message = "train: 1 of 14 clips cannot be decoded, more than the limit of 5.00%"
    with pytest.raises(DataSetError, match=message) as caught:
        write_manifests(root, annotate(root), workers=0)
    assert "--max-bad 0.072" in str(caught.value) and "5.mp4" in (root / BAD_FILES_NAME).read_text()
    assert (root / "train.arrow").read_bytes() == before
    # The limit that the message proposes is enough.
    write_manifests(root, annotate(root), workers=0, max_bad=0.072)
    assert len(Manifest.open(root / "train.arrow")) == 13


def test_a_decoder_that_crashes_names_its_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name the file when its decoder crashes; the processes are real, and only the crash is simulated."""
    monkeypatch.setattr("pipelines.prepare.scan.write_manifests.scan_one", crash_on_seven)
    annotations = annotate(root)
    del annotations.splits["val"]
    reports = write_manifests(root, annotations, workers=2, max_bad=0.5)
    ((path, reason),) = reports["train"].bad
    assert (
        path == "clips/7.mp4"
        and "the worker process died twice while scanning it (signal 11, Segmentation fault)" in reason
    )
    monkeypatch.undo()
    # Files of crashed decoders are tried again.
    assert write_manifests(root, annotations, workers=0)["train"].bad == []


def crash_on_seven(task: tuple[Path, str, Scanned | None]) -> Scanned:
    if task[1] == "clips/7.mp4":
        os.kill(os.getpid(), signal.SIGSEGV)
    return scan_one(task)


def test_paths_of_rows(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "data", tmp_path / "store" / "videos"
    elsewhere.mkdir(parents=True)
    root.mkdir()
    (root / "linked").symlink_to(elsewhere)
    assert row_path(root, root / "videos" / "a.mp4") == "videos/a.mp4"
    assert row_path(root, root / "x" / ".." / "a.mp4") == "a.mp4"
    assert row_path(root, elsewhere / "a.mp4") == "../store/videos/a.mp4"
    assert row_path(root, root / "linked" / "a.mp4") == "linked/a.mp4"
    assert row_path(root, Path("/usr/share/a.mp4")) == "/usr/share/a.mp4"
    (tmp_path / "deep" / "er").mkdir(parents=True)
    # `..` after a symbolic link leads to the parent of the real folder.
    (tmp_path / "deep" / "er" / "data").symlink_to(root)
    assert row_path(tmp_path / "deep" / "er" / "data", elsewhere / "a.mp4") == "../store/videos/a.mp4"


def test_clips_elsewhere_are_found_again(root: Path, tmp_path: Path) -> None:
    for videos in (tmp_path / "store", Path(shutil.copytree(root, f"/dev/shm/{tmp_path.parent.name}-{tmp_path.name}"))):
        manifests = tmp_path / f"manifests-{videos.name}"
        if not videos.exists():
            shutil.copytree(root, videos)
        write_manifests(manifests, annotate(videos), workers=0)
        manifest = Manifest.open(manifests / "train.arrow")
        path = manifest.root / manifest.row(0).path
        assert path.is_file() and path.resolve() == videos / "clips" / "13.mp4"
    shutil.rmtree(videos)


# --- As a command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def long(tmp_path: Path) -> Path:
    """A data set whose clips take a moment each to decode."""
    clip = write_mp4(tmp_path / "clip.mp4", np.tile(smooth_video(10, 256, 256), (12, 1, 1, 1)))
    for split, count in (("train", 60), ("val", 2)):
        for number in range(count):
            path = tmp_path / "data" / split / "a" / f"{number}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(clip, path)
    return tmp_path / "data"


def start(root: Path) -> "subprocess.Popen[str]":
    """Start a scan and return once its journal holds the first results."""
    process = subprocess.Popen(
        [*PREPARE, "folder", "--root", str(root), "--workers", "2"],
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until(lambda: process.poll() is not None or journal_lines(root) >= 4)
    assert process.poll() is None, process.communicate()
    return process


def journal_lines(root: Path) -> int:
    return (root / JOURNAL_NAME).read_text().count("\n") if (root / JOURNAL_NAME).exists() else 0


def children(process: "subprocess.Popen[str]") -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.slow
def test_ctrl_c_ends_at_once_and_the_next_start_goes_on(long: Path) -> None:
    process = start(long)
    start_s = time.monotonic()
    # A terminal sends SIGINT to the whole process group.
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and time.monotonic() - start_s < 3
    message = "interrupted. Fix: run the same command again to resume\n"
    assert [line for line in errors.splitlines(True) if "scan:" not in line] == [f"prepare.py folder: {message}"]
    assert not (long / "train.arrow").exists()
    done = journal_lines(long)
    assert 4 <= done < 62
    finished = subprocess.run(
        [*PREPARE, "folder", "--root", str(long), "--workers", "2"], capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    known = [int(line.rpartition(", ")[2].split()[0]) for line in finished.stdout.splitlines() if "reused from" in line]
    assert sum(known) == done and len(Manifest.open(long / "train.arrow")) == 60


@pytest.mark.slow
def test_sigterm_ends_it_in_the_same_way(long: Path) -> None:
    process = start(long)
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75
    assert errors.endswith("prepare.py folder: interrupted. Fix: run the same command again to resume\n")
    assert journal_lines(long) >= 4


@pytest.mark.slow
def test_a_killed_scan_leaves_no_process_and_goes_on(long: Path) -> None:
    process = start(long)
    workers = children(process)
    assert len(workers) >= 2
    process.kill()
    process.communicate()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 10)
    done = journal_lines(long)
    assert prepare.main(["folder", "--root", str(long), "--workers", "2"]) == 0
    assert journal_lines(long) >= 62 > done


@pytest.mark.slow
def test_a_worker_that_is_killed_from_outside_loses_nothing(long: Path) -> None:
    process = start(long)
    before = set(children(process))
    # The first child may be Python's resource tracker.
    for pid in before:
        if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(pid, signal.SIGKILL)
            break
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "60 of 60 clips" in output and "BAD" not in output


def test_nothing_of_this_needs_torch() -> None:
    """Import no torch: scanning processes start fast, and prepare.py runs on machines without torch."""
    code = "import sys, prepare, pipelines.prepare.scan.write_manifests; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, check=True, timeout=60)


DIES_AS_IT_STARTS = """
import os, pathlib, signal

LIVES, TEST = {lives}, {test}

def double(x):
    return 2 * x

if os.getpid() != TEST:
    lost = pathlib.Path(__file__).parent / "lost"
    with lost.open("a") as file:
        file.write("x")
    if len(lost.read_text()) < LIVES:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("lives", [2, 99])
def test_a_process_that_is_killed_as_it_starts_is_replaced_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lives: int
) -> None:
    """Replace a worker that is killed while importing the function's module, but only once."""
    name = f"dies_as_it_starts_{lives}"
    (tmp_path / f"{name}.py").write_text(DIES_AS_IT_STARTS.format(lives=lives, test=os.getpid()))
    monkeypatch.syspath_prepend(str(tmp_path))
    double = importlib.import_module(name).double
    if lives == 2:
        assert sorted(run_guarded(double, range(5), 1, "doubling")) == [(number, 2 * number) for number in range(5)]
        assert (tmp_path / "lost").read_text() == "xx"
    else:
        with pytest.raises(
            RuntimeError, match="doubling failed: a worker process ended before its first file .signal 9"
        ):
            list(run_guarded(double, range(5), 1, "doubling"))
