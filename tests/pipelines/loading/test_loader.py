"""Load batches with worker processes: content of batches, broken clips, and the end of workers."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipelines.decoding.decode import decode_clip
from pipelines.errors import BadClip
from pipelines.loading.clips import BadClipRecord, ClipBatch, ClipSource, EvaluationClips, TrainingClips
from pipelines.loading.worker_loader import ClipLoader, WorkerLostError, start_worker_server
from pipelines.manifest import ManifestRow, write_manifest
from pipelines.prepare.scan.scan_clip import scan_clip
from pipelines.stream.augmentation import Augmentation, replacement_row, sample_training_params
from pipelines.stream.eval_views import EvalProtocol, evaluation_views
from pipelines.stream.order import StreamOrder, evaluation_rows
from tests.helpers.clips import write_clips

ROOT = Path(__file__).resolve().parents[3]
CLIPS, FRAMES, WIDTH, HEIGHT, SEED = 6, 12, 48, 40, 3
AUGMENTATION = Augmentation(num_frames=4, size=32, flip="on")
PROTOCOL = EvalProtocol(num_frames=4, size=32)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a manifest of six clips of noise, the third in another size; labels are 0, 1, 2, 0, 1, 2."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    shapes = [(FRAMES, HEIGHT, WIDTH + 16 * (index == 2), 3) for index in range(CLIPS)]
    write_clips(folder / "train.arrow", (rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "clips"))


@pytest.fixture(scope="module", autouse=True)
def _server() -> None:
    start_worker_server()


def source(folder: Path) -> ClipSource:
    return ClipSource(folder / "train.arrow", "pyav")


def training_clips(folder: Path, augmentation: Augmentation = AUGMENTATION) -> TrainingClips:
    return TrainingClips(source(folder), augmentation, SEED)


def evaluation_clips(folder: Path, protocol: EvalProtocol = PROTOCOL) -> EvaluationClips:
    return EvaluationClips(source(folder), protocol)


def frames_of(folder: Path, row: int, frame_T: np.ndarray) -> torch.Tensor:
    """Decode whole frames of a row, uint8 (T, 3, H, W)."""
    return decode_clip("pyav", folder, source(folder).manifest.row(row), frame_T)


def positions(*batches: int) -> list[np.ndarray]:
    """Return stream positions in batches of these sizes."""
    ends = np.cumsum(batches)
    return [np.arange(end - size, end) for end, size in zip(ends, batches, strict=True)]


def check_equal(ours: list[ClipBatch], theirs: list[ClipBatch]) -> None:
    for first, second in zip(ours, theirs, strict=True):
        for name in ("video_NTCHW", "label_N", "row_N", "real_N"):
            assert torch.equal(getattr(first, name), getattr(second, name)), name
        assert first.bad_clips == second.bad_clips


def break_clips(folder: Path, *rows: int) -> None:
    for row in rows:
        os.truncate(folder / f"{row}.mp4", 100)


# --- Training ---------------------------------------------------------------------------------------------------------


def test_shapes_and_types(made: Path) -> None:
    (batch,) = ClipLoader(training_clips(made), 0, 2).batches(positions(3))
    assert batch.video_NTCHW.shape == (3, 4, 3, 32, 32)
    assert batch.video_NTCHW.dtype == torch.uint8
    assert batch.label_N.dtype == batch.row_N.dtype == torch.int64
    assert batch.real_N.tolist() == [True] * 3
    assert batch.bad_clips == ()


def test_rows_and_labels_are_those_of_the_order(made: Path) -> None:
    batches = list(ClipLoader(training_clips(made), 0, 2).batches(positions(5, 4, 5)))
    _, row_N = StreamOrder(CLIPS, SEED).at(np.arange(14))
    assert torch.cat([batch.row_N for batch in batches]).tolist() == row_N.tolist()
    assert torch.cat([batch.label_N for batch in batches]).tolist() == (row_N % 3).tolist()


def test_workers_give_the_batches_that_this_process_gives(folder: Path) -> None:
    break_clips(folder, 4)
    clips, batch_indices = training_clips(folder), positions(*[2] * 9)
    check_equal(
        list(ClipLoader(clips, 2, 2).batches(batch_indices)), list(ClipLoader(clips, 0, 2).batches(batch_indices))
    )


def test_a_clip_is_the_same_in_any_batch(made: Path) -> None:
    clips = training_clips(made)
    (whole,) = ClipLoader(clips, 0, 2).batches(positions(12))
    parts = list(ClipLoader(clips, 0, 2).batches(positions(3, 1, 8)))
    assert torch.equal(torch.cat([part.video_NTCHW for part in parts]), whole.video_NTCHW)


def test_a_clip_is_cut_anew_in_the_next_epoch(made: Path) -> None:
    (batch,) = ClipLoader(training_clips(made), 0, 2).batches(positions(2 * CLIPS))
    video_of = [{int(row): video for row, video in zip(rows, videos, strict=True)} for rows, videos in
                zip(batch.row_N.split(CLIPS), batch.video_NTCHW.split(CLIPS), strict=True)]  # fmt: skip
    assert all(not torch.equal(video_of[0][row], video_of[1][row]) for row in range(CLIPS))


def test_pixels_are_those_of_the_draw(made: Path) -> None:
    """Compare frames, crop and flip with the sampled augmentation, pixel by pixel, for crops that need no resampling."""
    augmentation = Augmentation(num_frames=4, size=20, crop_scales=(0.5,), flip="on")
    clips = training_clips(made, augmentation)
    (batch,) = ClipLoader(clips, 0, 2).batches(positions(3 * CLIPS))
    flips = set()
    for position, row in enumerate(batch.row_N.tolist()):
        width = WIDTH + 16 * (row == 2)
        params = sample_training_params(augmentation, FRAMES, width, HEIGHT, SEED, position // CLIPS, row)
        frames_TCHW = frames_of(made, row, params.frame_T)
        crop_TCHW = frames_TCHW[:, :, params.top : params.top + 20, params.left : params.left + 20]
        expected_TCHW = crop_TCHW.flip(-1) if params.flip else crop_TCHW
        assert torch.equal(batch.video_NTCHW[position], expected_TCHW)
        flips.add(params.flip)
    assert flips == {True, False}


def test_crops_are_resampled_to_the_networks_size(made: Path) -> None:
    """Resample crops of 40 x 40 to 10 x 10 by averaging: the mean stays and the deviation falls."""
    augmentation = Augmentation(num_frames=4, size=10, crop_scales=(1.0,))
    (batch,) = ClipLoader(training_clips(made, augmentation), 0, 2).batches(positions(1))
    row = int(batch.row_N[0])
    params = sample_training_params(augmentation, FRAMES, WIDTH + 16 * (row == 2), HEIGHT, SEED, 0, row)
    frames_TCHW = frames_of(made, row, params.frame_T)
    crop_TCHW = frames_TCHW[..., params.left : params.left + params.width].float()
    difference = batch.video_NTCHW[0].float().mean((1, 2, 3)) - crop_TCHW.mean((1, 2, 3))
    assert difference.abs().max() < 2
    assert batch.video_NTCHW[0].float().std() < crop_TCHW.std() / 2


def test_mirrored_clips_get_the_mirrored_label(made: Path, tmp_path: Path) -> None:
    """Swap labels 0 and 1 for exactly the clips that the sampled augmentation mirrors; pixels equal those of flip=on."""
    rows = [source(made).manifest.row(row) for row in range(CLIPS)]
    for row in rows:
        (tmp_path / row.path).symlink_to(made / row.path)
    write_manifest(tmp_path / "train.arrow", rows, ["swipe left", "swipe right", "stop"])
    relabel = replace(AUGMENTATION, flip="relabel", mirrored_words=(("left", "right"),))
    (plain,) = ClipLoader(training_clips(made), 0, 2).batches(positions(3 * CLIPS))
    (batch,) = ClipLoader(training_clips(tmp_path, relabel), 2, 2).batches(positions(3 * CLIPS))
    assert torch.equal(batch.video_NTCHW, plain.video_NTCHW)
    seen = set()
    for position, (row, label) in enumerate(zip(batch.row_N.tolist(), batch.label_N.tolist(), strict=True)):
        width = WIDTH + 16 * (row == 2)
        params = sample_training_params(AUGMENTATION, FRAMES, width, HEIGHT, SEED, position // CLIPS, row)
        assert label == ([1, 0, 2][row % 3] if params.flip else row % 3)
        seen.add((row % 3, params.flip))
    assert len(seen) == 6


def test_a_class_without_a_mirror_image_is_refused(made: Path, tmp_path: Path) -> None:
    write_manifest(tmp_path / "train.arrow", [source(made).manifest.row(0)], ["swipe left", "stop"])
    with pytest.raises(ValueError, match="class 'swipe left'"):
        training_clips(tmp_path, replace(AUGMENTATION, flip="relabel", mirrored_words=(("left", "right"),)))


# --- Broken clips in training -----------------------------------------------------------------------------------------


def replacement(row: int, epoch: int, broken: set[int]) -> tuple[int, list[tuple[int, int]]]:
    """Return the replacement row by the rule, and each `(broken row, its substitute)` on the way."""
    candidate, steps = row, []
    for attempt in range(10):
        if candidate not in broken:
            break
        substitute = replacement_row(CLIPS, SEED, epoch, row, attempt)
        steps.append((candidate, substitute))
        candidate = substitute
    return candidate, steps


@pytest.mark.parametrize("broken", [{1}, {0, 2, 5}])
def test_broken_clips_are_replaced_by_the_rule_and_recorded(folder: Path, broken: set[int]) -> None:
    break_clips(folder, *broken)
    (batch,) = ClipLoader(training_clips(folder), 0, 2).batches(positions(3 * CLIPS))
    epoch_N, row_N = StreamOrder(CLIPS, SEED).at(np.arange(3 * CLIPS))
    expected_rows, expected_records = [], []
    for epoch, row in zip(epoch_N.tolist(), row_N.tolist(), strict=True):
        stand_in, steps = replacement(row, epoch, broken)
        expected_rows.append(stand_in)
        expected_records += [(bad, epoch, substitute) for bad, substitute in steps]
    assert batch.row_N.tolist() == expected_rows
    assert [(record.row, record.epoch, record.replaced_by) for record in batch.bad_clips] == expected_records
    assert len(expected_records) >= 3 * len(broken)
    assert all(str(folder / f"{record.row}.mp4") in record.reason for record in batch.bad_clips)
    assert batch.label_N.tolist() == [row % 3 for row in expected_rows]
    assert batch.real_N.all()


def test_a_replacement_is_drawn_as_itself(folder: Path, made: Path) -> None:
    """Sample a replacement's augmentation from its own row, so that it equals its own occurrence in the epoch."""
    break_clips(folder, 1)
    (whole,) = ClipLoader(training_clips(made), 0, 2).batches(positions(CLIPS))
    (batch,) = ClipLoader(training_clips(folder), 0, 2).batches(positions(CLIPS))
    at = whole.row_N.tolist().index(1)
    own_place = whole.row_N.tolist().index(int(batch.row_N[at]))
    assert torch.equal(batch.video_NTCHW[at], whole.video_NTCHW[own_place])


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_but_broken_clips_is_an_error(folder: Path, workers: int) -> None:
    break_clips(folder, *range(CLIPS))
    batches = ClipLoader(training_clips(folder), workers, 2).batches(positions(2))
    with pytest.raises(BadClip, match="9 replacements cannot be decoded"):
        next(batches)
    assert wait_until_no_children()


def test_a_clip_and_nine_replacements_are_tried(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def fail(decoder: str, root: Path, row: ManifestRow, frame_T: object) -> None:
        tried.append(row.path)
        raise BadClip(f"{row.path}: no")

    monkeypatch.setattr("pipelines.loading.clips.decode_clip", fail)
    with pytest.raises(BadClip):
        next(ClipLoader(training_clips(folder), 0, 2).batches(positions(1)))
    assert len(tried) == 10


def test_a_file_of_another_size_of_picture_is_a_bad_clip(folder: Path) -> None:
    """Reject row 2's wider file under the name of row 0, although its length matches the manifest."""
    rows = [
        ManifestRow(path="2.mp4", offset=0, label=0, **vars(scan_clip(folder / "2.mp4")) | {"width": WIDTH}),
        ManifestRow(path="1.mp4", offset=0, label=1, **vars(scan_clip(folder / "1.mp4"))),
    ]
    write_manifest(folder / "train.arrow", rows, ["a", "b"])
    batch_indices = evaluation_rows(2, 2, rank=0, size=1)
    (batch,) = ClipLoader(evaluation_clips(folder), 0, 2).batches(batch_indices)
    assert batch.real_N.tolist() == [False, True]
    assert "64x40, but 48x40 when the manifest was made" in batch.bad_clips[0].reason


# --- Evaluation -------------------------------------------------------------------------------------------------------


def test_an_evaluation_has_every_clip_once_and_marks_padding(made: Path) -> None:
    clips = evaluation_clips(made)
    seen = []
    for rank in range(2):
        batches = list(ClipLoader(clips, 0, 2).batches(evaluation_rows(CLIPS, 2, rank, 2)))
        assert len(batches) == 2
        for batch in batches:
            seen += batch.row_N[batch.real_N].tolist()
            assert batch.label_N.tolist() == [row % 3 for row in batch.row_N.tolist()]
            assert (batch.video_NTCHW[~batch.real_N] == 0).all()
    assert sorted(seen) == list(range(CLIPS))


def test_an_evaluation_takes_the_centre(made: Path) -> None:
    """Take the centre crop: at size 35, frames with a shorter side of 40 pixels need no scaling."""
    (batch,) = ClipLoader(evaluation_clips(made, EvalProtocol(4, 35)), 0, 2).batches(evaluation_rows(1, 1, 0, 1))
    frames_TCHW = frames_of(made, 0, np.array([1, 4, 7, 10]))
    assert torch.equal(batch.video_NTCHW[0], frames_TCHW[:, :, 2:37, 6:41])


def test_all_views_of_a_clip_lie_side_by_side(made: Path) -> None:
    """Stack all views of a clip in order: ten dense clips of frames 0, 4, 8, 0 with 10 crops each.

    A clip of 12 frames is shorter than a dense window.
    """
    protocol = EvalProtocol(4, 35, clips="dense", crops=10)
    (batch,) = ClipLoader(evaluation_clips(made, protocol), 0, 2).batches(evaluation_rows(CLIPS, CLIPS, 0, 1))
    assert batch.video_NTCHW.shape == (CLIPS * 100, 4, 3, 35, 35)
    assert batch.label_N.tolist() == [0, 1, 2, 0, 1, 2]
    for row in (0, 2):
        video_VTCHW = batch.video_NTCHW[100 * row : 100 * row + 100]
        frames_TCHW = frames_of(made, row, np.array([0, 4, 8, 0]))
        right = 13 if row == 0 else 29
        steps_x, steps_y = (right // 4) * 4, 4
        crops = [(0, 0), (steps_x, 0), (0, steps_y), (steps_x, steps_y), (steps_x // 2, steps_y // 2)]
        for number, (left, top) in enumerate(crops):
            crop_TCHW = frames_TCHW[:, :, top : top + 35, left : left + 35]
            for window in range(10):
                assert torch.equal(video_VTCHW[10 * window + 2 * number], crop_TCHW)
                assert torch.equal(video_VTCHW[10 * window + 2 * number + 1], crop_TCHW.flip(-1))


def test_a_frame_that_many_views_see_is_decoded_once(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[list[int]] = []

    def noted(decoder: str, root: Path, row: ManifestRow, frame_T: np.ndarray) -> torch.Tensor:
        decoded.append(frame_T.tolist())
        return decode_clip(decoder, root, row, frame_T)

    monkeypatch.setattr("pipelines.loading.clips.decode_clip", noted)
    protocol = EvalProtocol(4, 32, clips="twice", crops=3)
    (batch,) = ClipLoader(evaluation_clips(made, protocol), 0, 2).batches(evaluation_rows(1, 1, 0, 1))
    assert decoded == [[0, 1, 3, 4, 6, 7, 9, 10]]
    assert batch.video_NTCHW.shape == (6, 4, 3, 32, 32)


def test_views_are_those_of_the_protocol(made: Path) -> None:
    """Scale every view of the protocol to a shorter side of 36."""
    protocol = EvalProtocol(4, 32, clips="twice", crops=3, full_resolution=True)
    (batch,) = ClipLoader(evaluation_clips(made, protocol), 0, 2).batches(evaluation_rows(1, 1, 0, 1))
    for number, view in enumerate(evaluation_views(protocol, FRAMES, WIDTH, HEIGHT)):
        frames_TCHW = frames_of(made, 0, view.frame_T)
        scaled_TCHW = torch.nn.functional.interpolate(frames_TCHW, (36, 43), mode="bilinear", antialias=True)
        assert torch.equal(batch.video_NTCHW[number], scaled_TCHW[..., view.left : view.left + 36])


def test_a_broken_clip_of_an_evaluation_is_missing_and_not_replaced(folder: Path) -> None:
    break_clips(folder, 4)
    batch_indices = evaluation_rows(CLIPS, CLIPS, rank=0, size=1)
    (batch,) = ClipLoader(evaluation_clips(folder), 0, 2).batches(batch_indices)
    assert batch.row_N.tolist() == list(range(CLIPS))
    assert batch.real_N.tolist() == [row != 4 for row in range(CLIPS)]
    assert (batch.video_NTCHW[4] == 0).all()
    (record,) = batch.bad_clips
    assert record == BadClipRecord(4, 0, record.reason, None)
    assert str(folder / "4.mp4") in record.reason


def test_batch_indices_are_not_changed_by_a_broken_clip(folder: Path) -> None:
    """Keep the batch indices unchanged: the next evaluation uses them again, and the file may be back."""
    break_clips(folder, 4)
    batch_indices = evaluation_rows(CLIPS, CLIPS, rank=0, size=1)
    list(ClipLoader(evaluation_clips(folder), 0, 2).batches(batch_indices))
    assert batch_indices[0][1].all()


def test_workers_evaluate_as_this_process_does(folder: Path) -> None:
    break_clips(folder, 1)
    clips, batch_indices = evaluation_clips(folder), evaluation_rows(CLIPS, 2, rank=1, size=2)
    check_equal(
        list(ClipLoader(clips, 2, 2).batches(batch_indices)), list(ClipLoader(clips, 0, 2).batches(batch_indices))
    )


# --- Life cycle of workers --------------------------------------------------------------------------------------------


def wait_until_no_children() -> bool:
    for _ in range(100):
        if not multiprocessing.active_children():
            return True
        time.sleep(0.1)
    return False


def test_workers_end_after_the_last_batch(made: Path) -> None:
    batches = ClipLoader(training_clips(made), 2, 2).batches(positions(2, 2, 2))
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    list(batches)
    assert wait_until_no_children()


def test_workers_end_when_the_iterator_is_dropped(made: Path) -> None:
    batches = ClipLoader(training_clips(made), 2, 2).batches(positions(*[2] * 50))
    next(batches)
    del batches
    assert wait_until_no_children()


class KillsItsSender:
    """An object that, when unpickled, kills the worker that sent it and delays the fork server's report of the death."""

    def __reduce__(self) -> tuple[Callable[[int, int], int], tuple[int, int]]:
        return kill_unreported, (os.getpid(), os.getppid())


def kill_unreported(worker: int, server: int) -> int:
    os.kill(server, signal.SIGSTOP)
    os.kill(worker, signal.SIGKILL)
    while state_of(worker) != "Z":
        time.sleep(0.01)
    threading.Timer(1, os.kill, (server, signal.SIGCONT)).start()
    return worker


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


class LostOnTheWay(Dataset[tuple[KillsItsSender, Tensor]]):
    def __init__(self, note: Path) -> None:
        self.note = note

    def __getitem__(self, item: int) -> tuple[KillsItsSender, Tensor]:
        self.note.write_text(str(os.getpid()))
        return KillsItsSender(), torch.zeros(1000)


def test_a_worker_that_is_killed_while_its_batch_is_on_the_way_is_named(tmp_path: Path) -> None:
    """Name the killed worker: the kernel's error for a closed connection does not say whose it was."""
    with pytest.raises(WorkerLostError, match="was killed: pid [0-9]+, ") as caught:
        list(ClipLoader(LostOnTheWay(tmp_path / "worker"), 1, 2).batches([0, 1]))
    assert f"pid {(tmp_path / 'worker').read_text()}, " in str(caught.value)


PARENT = """
import sys
from pathlib import Path

import numpy as np

from pipelines.loading.clips import ClipSource, TrainingClips
from pipelines.loading.worker_loader import ClipLoader, start_worker_server
from pipelines.stream.augmentation import Augmentation

if __name__ == "__main__":
    start_worker_server()
    clips = TrainingClips(ClipSource(Path(sys.argv[1]), "pyav"), Augmentation(4, 32), 0)
    batches = ClipLoader(clips, 2, 2).batches([np.array([position]) for position in range(1000)])
    for _ in range(8):
        next(batches)
    print("ready", flush=True)
    for line in sys.stdin:
        next(batches)
        print("batch", flush=True)
"""


@pytest.fixture
def training(made: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in its own session that has taken batches from two workers and takes another per input line."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    command = [sys.executable, str(script), str(made / "train.arrow")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            for survivor in session(process.pid):
                os.kill(survivor, signal.SIGKILL)


def session(leader: int) -> set[int]:
    """Return the living processes of a session."""
    alive = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, in_session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            # The process has ended meanwhile.
            continue
        if int(in_session) == leader and state not in "ZX":
            alive.add(int(stat.parent.name))
    return alive


LINUX = pytest.mark.skipif(
    sys.platform != "linux", reason="reads /proc, and workers end with their parent on Linux alone"
)


@LINUX
def test_no_worker_outlives_a_parent_that_was_killed(training: subprocess.Popen[str]) -> None:
    # The parent, the fork server and two workers.
    assert len(session(training.pid)) >= 4
    os.kill(training.pid, signal.SIGKILL)
    for _ in range(100):
        if not session(training.pid):
            return
        time.sleep(0.1)
    pytest.fail(f"still alive after 10 s: {session(training.pid)}")


@LINUX
def test_ctrl_c_is_not_the_workers_business(training: subprocess.Popen[str]) -> None:
    """Ignore SIGINT in workers: a terminal sends it to the whole process group, and only the training process may act."""
    others = session(training.pid) - {training.pid}
    for process in others:
        os.kill(process, signal.SIGINT)
    assert training.stdin is not None
    assert training.stdout is not None
    # More batches than were decoded ahead.
    for _ in range(12):
        training.stdin.write("next\n")
        training.stdin.flush()
        assert training.stdout.readline() == "batch\n"
    assert others <= session(training.pid)
    training.stdin.close()
    assert training.wait(timeout=30) == 0


def test_the_signal_handler_of_this_process_is_left_alone() -> None:
    def mine(number: int, frame: object) -> None: ...

    previous = signal.signal(signal.SIGINT, mine)
    try:
        start_worker_server()
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, previous)


def test_workers_do_not_import_the_program_that_starts_them(tmp_path: Path) -> None:
    """Import in workers only what the program imports outside its __main__ guard."""
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "class Loaded:\n"
        "    def __getitem__(self, index):\n"
        "        return index, __name__, [name for name in ('hydra', 'training') if name in sys.modules]\n"
        "if __name__ == '__main__':\n"
        "    import hydra, training.main\n"
        "    from pipelines.loading.worker_loader import ClipLoader, start_worker_server\n"
        "    start_worker_server()\n"
        "    print(Loaded()[2])\n"
        "    for item in ClipLoader(Loaded(), workers=1, prefetch=2).batches([1, 0]):\n"
        "        print(item)\n"
    )
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == [
        "(2, '__main__', ['hydra', 'training'])",
        "(1, '__mp_main__', [])",
        "(0, '__mp_main__', [])",
    ], done.stderr
