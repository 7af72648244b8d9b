"""Resuming runs: changed code, a changed recipe, a full disk, and a missing checkpoint folder."""

import dataclasses
import functools
import json
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from distributed.backends.single import SingleBackend
from distributed.checkpoint.store import Checkpoint, load_checkpoint, load_newest
from distributed.health.rank_log import RankLog
from distributed.topology import find_topology
from pipelines.manifest import Manifest
from tests.helpers.clips import renumber
from tests.helpers.jobs import Ended, make_clips, start_training
from tests.helpers.small_disk import mounted
from tests.helpers.worlds import CHECKOUT, World, available
from tests.world_cases.bodies import EQUIVALENCE, VARIANTS, Context, compose_config, job_of
from training.config.load import register
from training.errors import ConfigError, StorageError
from training.evaluation.evaluate import Evaluation
from training.evaluation.metrics import Scores
from training.job import Job
from training.loop import train as train_loop
from training.runs.code_version import DECIDES_NUMBERS, check_code, code_version, decides_numbers
from training.runs.run_folder import RunFolder
from training.telemetry.metrics_log import MetricsLog
from training.telemetry.records import read_metrics

# --- Changed code -----------------------------------------------------------------------------------------------------

SOURCE = '''"""What it is."""


class Step:
    size: int = 3
    """A line on size."""

    def take(self, rate: float) -> float:
        """Take it."""
        return rate * self.size  # why
'''


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    numbers = ("training/step.py", "training/optim/lars.py")
    for name in ("train.py", *numbers, *CANNOT_CHANGE_NUMBERS, "docs/words.md", "tests/test_step.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SOURCE)
    return tmp_path


CANNOT_CHANGE_NUMBERS = (
    "training/report/html.py",
    "training/report/charts.py",
    "training/telemetry/metrics_log.py",
    "training/telemetry/stragglers.py",
    "training/planning/summary.py",
    "training/planning/plan.py",
    "training/planning/memory.py",
    "distributed/health/monitor.py",
    "distributed/checkpoint/writer.py",
    "pipelines/prepare/repack/stage.py",
)
"""Reports, telemetry, planning, and the like: a requeued job continues when they changed."""


def refusal(before: dict[str, Any] | None, now: dict[str, Any], *overrides: str) -> str:
    """Error of resuming code `now` from a checkpoint of code `before`; empty if it resumes."""
    register()
    config = compose_config("experiment=smoke", *overrides)
    state = {"step": 7} | ({} if before is None else {"code": before})
    try:
        check_code(
            config.checkpoint,
            config.numerics.deterministic,
            now,
            RunFolder(Path("outputs/run")),
            Checkpoint({}, {}, state),
        )
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("file", "then", "now"),
    [
        ("docs/words.md", "What", "Why"),
        ("tests/test_step.py", "size", "length"),
        ("training/step.py", "# why", "# and why not"),
        ("training/step.py", "A line on size", "Another line"),
        ("training/step.py", '        """Take it."""\n', ""),
        ("training/step.py", "rate * self.size", "(\n            rate * self.size\n        )"),
    ],
    ids=["documentation", "test", "comment", "line on a field", "docstring", "layout"],
)
def test_what_cannot_change_a_result_does_not_count(checkout: Path, file: str, then: str, now: str) -> None:
    before = code_version(checkout)
    (checkout / file).write_text(SOURCE.replace(then, now))
    assert (checkout / file).read_text() != SOURCE
    assert refusal(before, code_version(checkout)) == ""


def test_other_code_that_decides_numbers_is_refused_and_named(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = code_version(checkout) | {"commit": "abc"}
    (checkout / "training/step.py").write_text(SOURCE.replace("size: int = 3", "size: int = 4"))
    (checkout / "training/optim/lars.py").unlink()
    (checkout / "tsm").mkdir()
    (checkout / "tsm/new.py").write_text("")
    (checkout / "training/report/html.py").write_text(SOURCE.replace("size: int = 3", "size: int = 4"))
    now = code_version(checkout) | {"commit": "def"}
    told = refusal(before, now)
    assert "commit abc then, def now" in told
    assert "and they decide numbers: training/optim/lars.py, training/step.py, tsm/new.py)" in told
    assert "Fix: go back" in told and "checkpoint.allow_code_change=true" in told
    assert refusal(before, now, "checkpoint.allow_code_change=true") == ""
    warned = capsys.readouterr().out
    assert "these files decide numbers: training/optim/lars.py, training/step.py, tsm/new.py" in warned


@pytest.mark.parametrize("file", ["train.py", *CANNOT_CHANGE_NUMBERS])
def test_other_code_that_decides_no_numbers_is_warned_of(
    checkout: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    before = code_version(checkout)
    (checkout / file).write_text(SOURCE.replace("size: int = 3", "size: int = 4"))
    now = code_version(checkout)
    assert refusal(before, now) == ""
    told = capsys.readouterr().out
    assert "code: WARNING: resuming with other code than the checkpoint of step 7" in told
    assert f"none of these files decides numbers: {file}\n" in told
    told = refusal(before, now, "numerics.deterministic=true")
    assert f"in deterministic mode any change counts: {file})" in told
    assert refusal(before, now, "numerics.deterministic=true", "checkpoint.allow_code_change=true") == ""


def test_a_file_that_decided_numbers_then_counts_when_it_is_gone(checkout: Path) -> None:
    """A file may leave the list between the checkpoint and now."""
    before = code_version(checkout)
    before["decides_numbers"].append("training/moved.py")
    before["files"]["training/moved.py"] = "digest"
    assert "they decide numbers: training/moved.py)" in refusal(before, code_version(checkout))


@pytest.mark.parametrize("overrides", [[], ["numerics.deterministic=true"]], ids=["usual", "deterministic"])
def test_a_record_of_the_first_scheme_is_warned_of(
    checkout: Path, capsys: pytest.CaptureFixture[str], overrides: list[str]
) -> None:
    """Runs started before the files moved resume, also in deterministic mode."""
    before = {"commit": "abc", "files": {"train.py": "digest", "training/step.py": "digest"}}
    now = code_version(checkout) | {"commit": "def"}
    assert refusal(before, now, *overrides) == ""
    told = capsys.readouterr().out
    assert told.startswith("code: WARNING: the checkpoint of step 7 has an older record of its code")
    assert "cannot be compared" in told and "commit abc then, def now" in told and "numbers may differ" in told


def test_a_record_has_what_older_code_reads(checkout: Path) -> None:
    """Older code compares `commit` and `files`; the state of a checkpoint is JSON."""
    record = json.loads(json.dumps(code_version(checkout)))
    assert record == code_version(checkout)
    assert set(record) >= {"commit", "files"} and len(record["files"]["training/step.py"]) == 64


def test_a_checkpoint_that_does_not_know_its_code_is_taken(checkout: Path) -> None:
    assert refusal(None, code_version(checkout)) == ""


@functools.cache
def recorded_files() -> dict[str, str]:
    files: dict[str, str] = code_version(CHECKOUT)["files"]
    return files


def test_the_code_of_this_checkout_is_all_that_trains() -> None:
    files = recorded_files()
    assert {
        "train.py",
        "training/step.py",
        "training/optim/lars.py",
        "tsm/shift.py",
        "pipelines/stream/order.py",
    } <= set(files)
    assert not [name for name in files if name.startswith(("tests", "docs", "tools", "benchmarks"))]


@pytest.mark.parametrize("entry", DECIDES_NUMBERS)
def test_every_entry_that_decides_numbers_exists(entry: str) -> None:
    path = CHECKOUT / entry
    assert path.is_dir() or path.is_file(), "a file moved: training.code_version names its old place"
    assert decides_numbers(recorded_files(), [entry]), "no recorded file lies in it"


@pytest.mark.parametrize("file", CANNOT_CHANGE_NUMBERS)
def test_what_cannot_change_numbers_exists_and_is_in_no_entry(file: str) -> None:
    assert (CHECKOUT / file).is_file()
    assert decides_numbers([file]) == []


# --- In this process --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clips(tmp_path_factory.mktemp("resume") / "clips")


FAST = ["pipeline.size=16", "numerics.dtype=float32", "checkpoint.every_steps=1", "checkpoint.keep=1"]
SCORES = Scores(20, 0, 1.0, 0.0, 50.0, 10.0, 1.0, None)


class NobodyElse:
    """Substitute for a control channel, whose monitor would outlive the test. Raises a signal at a set evaluation heartbeat."""

    signal_at, name = 0, ""

    def __init__(self) -> None:
        self.log = RankLog(0, "here")

    def progress(self, step: int, phase: str) -> None:
        if phase == "evaluation" and self.name:
            self.signal_at -= 1
            if self.signal_at == 0:
                signal.raise_signal(signal.Signals[self.name])

    def agreed_stop(self, step: int, limit: int, wanted: str | None) -> str | None:
        return wanted

    def stop_wanted(self, wanted: str | None) -> bool:
        return wanted is not None

    def stop_reason(self) -> str:
        return self.name

    def check_run_lock(self) -> None:
        """Do nothing: nobody else writes to the run folder."""


@pytest.fixture
def alone(tmp_path: Path) -> Context:
    """World of one process, with run folders in `tmp_path / "disk"`."""
    register()
    backend = SingleBackend(find_topology(), torch.device("cpu"))
    return Context(tmp_path / "disk", backend, cast(Any, NobodyElse()))


def wait_until(true: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def run_with(
    context: Context, clips: Path, at: dict[int, Callable[[], object]], *overrides: str, exit_code: int = 0
) -> Job:
    """Train, and call functions before given steps."""
    job = job_of(context, "run", *FAST, f"data.root={clips}", *overrides)
    take_step = job.trainer.step

    def step(number: int, *arguments: Any) -> Tensor:
        at.get(number, lambda: None)()
        return take_step(number, *arguments)

    job.trainer.step = step  # type: ignore[method-assign, assignment]
    job.folder.checkpoints.mkdir(parents=True, exist_ok=True)
    records = MetricsLog(job.config, job.folder, True, job.first_step, job.recipe.total_steps)
    try:
        assert train_loop(job, records) == exit_code
    finally:
        records.close(0)
    return job


def test_state_that_another_recipe_adds_starts_anew(
    alone: Context, clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*FAST, f"data.root={clips}"]
    run_with(alone, clips, {}, "max_steps=2")
    changes = ["optimizer.ema_decay=0.9", "optimizer.name=lamb", "checkpoint.allow_recipe_change=true"]
    with pytest.raises(ConfigError, match=r"another recipe .*optimizer\.ema_decay: None then, 0\.9 now"):
        job_of(alone, "run", *options, *changes[:2])
    job = job_of(alone, "run", *options, *changes)
    saved = load_newest(job.folder.checkpoints)[0]
    assert saved is not None and job.first_step == 2
    assert job.trainer.ema is not None
    for name, average in job.trainer.ema.tensors().items():
        assert average.equal(saved.network[name.removeprefix("average.")]), name
    assert all(not state["exp_avg"].any() for state in job.trainer.optimizer.state.values())
    assert (
        "has no state for exp_avg, exp_avg_sq, the EMA of weights: it starts as in a new run" in capsys.readouterr().out
    )


def test_classes_with_other_numbers_do_not_resume(alone: Context, clips: Path, tmp_path: Path) -> None:
    """Also not where another recipe is allowed: each row of the classifier would get another meaning."""
    run_with(alone, clips, {}, "max_steps=1")
    classes = Manifest.open(clips / "train.arrow").classes
    other = tmp_path / "clips"
    for split in ("train", "val"):
        renumber(clips / f"{split}.arrow", other / f"{split}.arrow", classes[::-1])
    refused = rf"class 0 is '{classes[-1]}' in .*/train\.arrow, '{classes[0]}' in the run\. Fix: choose another run_id"
    with pytest.raises(ConfigError, match=refused):
        job_of(alone, "run", *FAST, f"data.root={other}", "checkpoint.allow_recipe_change=true")


def steps_of(job: Job, kind: str, key: str) -> list[int]:
    return [record["step"] for record in read_metrics(job.folder.metrics) if record["kind"] == kind and key in record]


def test_training_goes_on_over_a_folder_that_is_gone(
    alone: Context, clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints, away = alone.folder / "run" / "checkpoints", alone.folder / "run" / "away"

    def lose() -> None:
        wait_until(lambda: (checkpoints / "step-00000002").exists())
        checkpoints.rename(away)

    job = run_with(alone, clips, {2: lose, 5: lambda: away.rename(checkpoints)}, "max_steps=7")
    assert steps_of(job, "checkpoint", "failed")[:2] == [3, 4]
    assert steps_of(job, "checkpoint", "stall_s") == [1, 2, 3, 4, 5, 6, 7]
    assert "NO CHECKPOINT at step 3: cannot write" in capsys.readouterr().out
    newest = load_newest(checkpoints)[0]
    assert newest is not None and newest.state["step"] == 7


def test_training_goes_on_on_a_full_disk(alone: Context, clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Records cannot be written either: the lost ones are missing from the file, and the log says so."""
    disk = alone.folder
    filler, checkpoints = disk / "filler", disk / "run" / "checkpoints"

    def fill() -> None:
        wait_until(lambda: (checkpoints / "step-00000002").exists())
        metrics = disk / "run" / "metrics.jsonl"
        # Pad the file to a full page, so that the last page has no free space.
        with metrics.open("ab") as file:
            file.write(b"\n" * (-metrics.stat().st_size % 4096))
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(4096)):
                pass

    # A checkpoint has 90 MB, and two exist at a time.
    with mounted(disk, "240m"):
        job = run_with(alone, clips, {2: fill, 5: filler.unlink}, "max_steps=7", "logger.every_steps=1")
        output = capsys.readouterr().out
        assert "NO CHECKPOINT at step 3: cannot write" in output and "No space left" in output
        assert "metrics log: cannot write" in output
        # Training continued.
        assert "step      4  loss" in output
        newest = load_newest(checkpoints)[0]
        assert newest is not None and newest.state["step"] == 7
        assert {1, 2, 6, 7} <= set(steps_of(job, "train", "loss"))
        assert 4 not in steps_of(job, "train", "loss")


@pytest.mark.parametrize(("minutes", "saved"), [("0.0001", [5, 10]), ("1000", [10]), ("null", [10])])
def test_saves_by_the_clock_come_with_training_records(
    alone: Context, clips: Path, minutes: str, saved: list[int]
) -> None:
    clock = ["checkpoint.every_steps=null", "checkpoint.every_epochs=100", f"checkpoint.every_minutes={minutes}"]
    job = run_with(alone, clips, {}, *clock, "logger.every_steps=5", "max_steps=10")
    assert steps_of(job, "checkpoint", "stall_s") == saved


def test_a_run_whose_last_checkpoint_failed_is_not_finished(alone: Context, clips: Path) -> None:
    checkpoints, kept = alone.folder / "run" / "checkpoints", alone.folder / "kept"
    options = ["max_steps=1", "checkpoint.last_retry_s=0", f"checkpoint.second_place={kept}"]
    with pytest.raises(StorageError, match=r"its last checkpoint could not be written.*Fix: make room"):
        run_with(alone, clips, {0: checkpoints.rmdir}, *options)
    # The fix that the error names: the next start has nothing left to do.
    shutil.copytree(kept / "run" / "step-00000001", checkpoints / "step-00000001")
    job = run_with(alone, clips, {}, *options)
    assert job.first_step == 1 and steps_of(job, "checkpoint", "stall_s") == [1]


def test_the_best_is_saved_when_it_is_found_and_kept(
    alone: Context, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tops = iter([20.0, 50.0, 30.0, 50.0])

    def evaluate(*_: Any, **__: Any) -> Evaluation:
        scores = dataclasses.replace(SCORES, top1_percent=next(tops))
        return Evaluation(scores, cast(Any, None), [])

    monkeypatch.setattr("training.evaluation.validate.evaluate", evaluate)
    options = ["checkpoint.every_steps=null", "checkpoint.every_epochs=100", "evaluation.every_epochs=1"]
    job = run_with(alone, clips, {}, *options)
    assert steps_of(job, "evaluation", "top1_percent") == [5, 10, 15, 20]
    assert steps_of(job, "checkpoint", "stall_s") == [5, 10, 20]
    assert sorted(path.name for path in job.folder.checkpoints.iterdir()) == ["best", "step-00000010", "step-00000020"]
    best = load_checkpoint(job.folder.checkpoints / "best")
    assert (best.state["step"], best.state["best_top1_percent"]) == (10, 50.0)


# --- Stopped during an evaluation -------------------------------------------------------------------------------------

TWO_EVALUATIONS = ["schedule.epochs=2", "evaluation.every_epochs=1", "optimizer.ema_decay=0.8"]


def evaluations_of(job: Job) -> list[dict[str, Any]]:
    records = [record for record in read_metrics(job.folder.metrics) if record["kind"] == "evaluation"]
    return [record | {"time_s": 0, "duration_s": 0} for record in records]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("statistics", "signals_at"),
    [([], (3, 6, 2)), (["batch.precise_bn_steps=3"], (3, 12, 2))],
    ids=["averaged", "precise"],
)
def test_an_evaluation_that_a_signal_cuts_off_is_made_by_the_next_start(
    alone: Context, clips: Path, capsys: pytest.CaptureFixture[str], statistics: list[str], signals_at: tuple[int, ...]
) -> None:
    """Signals interrupt the first evaluation, then the last one twice, during precise batch norm and during scoring."""
    options = [*TWO_EVALUATIONS, "checkpoint.every_steps=null", *statistics]
    expected = run_with(alone, clips, {}, *options)
    again = dataclasses.replace(alone, folder=alone.folder.parent / "again")
    control = cast(NobodyElse, alone.control)
    stops = (("SIGTERM", 75, 5), ("SIGINT", 130, 10), ("SIGUSR1", 75, 10))
    for (name, exit_code, step), control.signal_at in zip(stops, signals_at, strict=True):
        control.name = name
        job = run_with(again, clips, {}, *options, exit_code=exit_code)
        saved = load_newest(job.folder.checkpoints)[0]
        assert saved is not None and (saved.state["step"], saved.state["evaluation_owed"]) == (step, True)
        assert (
            f"stopped by {name} after step {step}, with a checkpoint, evaluation still owed" in capsys.readouterr().out
        )
        assert len(evaluations_of(job)) == (step > 5)
    control.name = ""
    job = run_with(again, clips, {}, *options)
    assert job.first_step == 10
    assert [record["step"] for record in evaluations_of(job)] == [5, 10]
    assert evaluations_of(job) == evaluations_of(expected)
    ends = [load_newest(run.folder.checkpoints)[0] for run in (expected, job)]
    assert ends[0] is not None and ends[1] is not None
    assert ends[0].state == ends[1].state and not ends[1].state["evaluation_owed"]
    for name, tensor in (ends[0].network | ends[0].optimizer).items():
        assert tensor.equal((ends[1].network | ends[1].optimizer)[name]), name


@pytest.mark.parametrize("stopped_at", [4, 3])
def test_a_signal_in_front_of_an_evaluation_leaves_it_to_the_next_start(
    alone: Context, clips: Path, stopped_at: int
) -> None:
    """The next start owes an evaluation only if one was due when the signal stopped the run."""
    options = [*TWO_EVALUATIONS, "checkpoint.every_steps=null", "max_steps=6"]
    job = run_with(alone, clips, {stopped_at: lambda: signal.raise_signal(signal.SIGUSR1)}, *options, exit_code=75)
    assert evaluations_of(job) == []
    job = run_with(alone, clips, {}, *options)
    assert (job.first_step, job.evaluation_owed) == (stopped_at + 1, stopped_at == 4)
    assert [record["step"] for record in evaluations_of(job)] == [5]


# --- A different world size -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Path:
    """Run folder of 20 steps by two processes; steps 10 and 20 are saved."""
    folder = tmp_path_factory.mktemp("two")
    ended = train_in(available(World("torchrun", 2)), folder, clips, "whole")
    assert ended.exit_code == 0, ended.output
    return folder / "whole"


def train_in(world: World, folder: Path, clips: Path, run_id: str) -> Ended:
    """Train with batch norm local to ranks, whose statistics are averaged in the checkpoint."""
    options = [*EQUIVALENCE, *VARIANTS["groups_of_2_accumulated"], "logger.every_steps=1"]
    places = [f"data.root={clips}", f"outputs={folder}", f"run_id={run_id}"]
    return start_training(world, folder / f"{run_id}.txt", *options, *places).wait(600)


@pytest.mark.slow
@pytest.mark.parametrize(
    "world", [World("none", 1), World("torchrun", 4), World("horovodrun", 4)], ids=lambda w: w.name
)
def test_a_run_of_two_processes_goes_on_in_another_world(
    tmp_path: Path, clips: Path, of_two_processes: Path, world: World
) -> None:
    """Losses per step are equal, and at the end the weights, EMA of weights and running statistics."""
    half_way = "checkpoints/step-00000010"
    shutil.copytree(of_two_processes / half_way, tmp_path / "half" / half_way)
    ended = train_in(available(world), tmp_path, clips, "half")
    assert ended.exit_code == 0 and "resuming half from step 10" in ended.output, ended.output
    expected, found = (
        {record["step"]: record["loss"] for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "train"}
        for run in (of_two_processes, tmp_path / "half")
    )
    assert list(found) == list(range(11, 21))
    assert found == pytest.approx({step: expected[step] for step in found}, rel=1e-9)
    assert len(set(found.values())) == 10
    ends = [load_checkpoint(run / "checkpoints/step-00000020") for run in (of_two_processes, tmp_path / "half")]
    tensors = [end.network | end.optimizer for end in ends]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        limit = 1e-9 * tensor.abs().max().clamp_min(1e-12)
        assert (tensors[1][name] - tensor).abs().max() <= limit, name
