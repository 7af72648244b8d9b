"""Ranks that die or hang in real jobs on every backend: the job ends and its log names the rank."""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distributed.health.rank_log import node_log
from tests.helpers.jobs import Ended, RunningJob, differing, make_clips, start_training, wait_for_record
from tests.helpers.worlds import CHECKOUT, World, available
from training.telemetry.records import read_metrics

pytestmark = pytest.mark.slow

# Allows for a busy machine.
START_S = 180
END_S = 30

ENDLESS = (
    "experiment=smoke logger=disabled logger.every_steps=1 pipeline.size=32 model.num_frames=4 pipeline.decoder=pyav "
    "batch.global_batch=8 schedule.warmup_epochs=0 schedule.epochs=4000 evaluation.every_epochs=10000 "
    "checkpoint.every_epochs=10000"
).split()

KILLED = [
    (World("torchrun", 4), 2),
    (World("local", 2), 0),
    (World("horovodrun", 4), 0),
    (World("horovodrun", 2), 1),
    (World("mpirun", 4), 2),
    (World("mpirun", 2), 0),
]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clips(tmp_path_factory.mktemp("faults") / "clips")


def name_of(value: object) -> str:
    return value.name if isinstance(value, World) else str(value)


def start(world: World, folder: Path, clips: Path, *overrides: str) -> RunningJob:
    """Start a job that trains forever, and wait for its first steps."""
    arguments = [*ENDLESS, f"data.root={clips}", f"outputs={folder.parent}", f"run_id={folder.name}", *overrides]
    folder.mkdir(exist_ok=True)
    job = start_training(world, folder / "console.txt", *arguments)
    wait_for_record(folder / "metrics.jsonl", "train", START_S)
    return job


def log_of(run: Path) -> str:
    return (run / "log.txt").read_text()


def gathered(run: Path, name: str) -> str:
    """Read the file of this name from those gathered when the job failed."""
    (path,) = run.glob(f"failures/*/{name}")
    return path.read_text()


def outcome_of(run: Path) -> dict[str, object]:
    outcome: dict[str, object] = json.loads((run / "outcome.json").read_text())
    return outcome


@pytest.fixture
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Run folder with a name unique to the test, because the node logs use it."""
    return tmp_path / f"fault-{os.getpid()}-{tmp_path.parent.name}-{tmp_path.name}"


@pytest.mark.parametrize(("world", "victim"), KILLED, ids=name_of)
def test_a_killed_rank_ends_the_job_and_is_named_by_all_that_can(
    world: World, run: Path, clips: Path, victim: int
) -> None:
    job = start(available(world), run, clips)
    os.kill(job.ranks()[victim], signal.SIGKILL)
    ended = job.wait(END_S)
    assert ended.left_running == []
    assert ended.exit_code != 0
    verdict = f"rank {victim} on {os.uname().nodename} is gone"
    assert verdict in log_of(run), ended.output
    assert outcome_of(run)["exit_code"] == 75, ended.output
    for rank in range(1, world.size):
        # MPI may abort a process as soon as MPI sees a peer disconnect, before the process logs anything.
        if rank != victim and world.launcher != "mpirun":
            log = gathered(run, f"rank-{rank:05d}.log") if victim != 0 else node_log(run.name, rank).read_text()
            # Horovod on Gloo ends a process by an exception of its own thread, if it sees the disconnect first.
            is_aborted = world.launcher == "horovodrun" and "Fatal Python error: Aborted" in log
            assert verdict in log or is_aborted, log + ended.output
    # A neighbour sends the log of a dead rank.
    if victim != 0:
        assert "step      1" in gathered(run, f"rank-{victim:05d}.log")


@pytest.mark.parametrize("world", [World("torchrun", 2), World("local", 2)], ids=name_of)
def test_ranks_whose_launcher_is_killed_save_and_end(world: World, run: Path, clips: Path) -> None:
    job = start(world, run, clips)
    job.process.kill()
    ended = job.wait(END_S)
    assert ended.left_running == []
    assert outcome_of(run) | {"time_s": 0} == {"exit_code": 75, "reason": "stopped in good order", "time_s": 0}
    assert "stopped by SIGTERM after step" in log_of(run)
    assert len(list((run / "checkpoints").glob("step-*"))) == 1


def test_a_killed_loader_worker_ends_the_job_with_its_reason(run: Path, clips: Path) -> None:
    world = World("torchrun", 2)
    job = start(world, run, clips)
    (worker,) = job.loader_workers(1)
    os.kill(worker, signal.SIGKILL)
    ended = job.wait(END_S)
    assert ended.left_running == []
    outcome = outcome_of(run)
    assert outcome["exit_code"] == 75, outcome
    words = str(outcome["reason"])
    assert words.startswith("rank 1 on") and "decoding worker process was killed" in words and str(worker) in words, (
        words
    )


def test_a_loader_worker_killed_in_an_evaluation_ends_the_job_with_its_reason(run: Path, clips: Path) -> None:
    world = World("torchrun", 2)
    job = start(world, run, clips, *"evaluation=dense_30 evaluation.every_epochs=1 evaluation.batch=30".split())
    wait_for_record(run / "metrics.jsonl", "train", START_S, step=5)
    deadline_s = time.monotonic() + START_S
    # One worker for training, one for the evaluation.
    while len(workers := job.loader_workers(1)) < 2:
        assert time.monotonic() < deadline_s and job.process.poll() is None
        time.sleep(0.05)
    os.kill(workers[-1], signal.SIGKILL)
    ended = job.wait(END_S)
    assert ended.left_running == []
    words = str(outcome_of(run)["reason"])
    assert outcome_of(run)["exit_code"] == 75, words
    assert (
        words.startswith("rank 1 on") and "decoding worker process was killed" in words and str(workers[-1]) in words
    ), words


def test_a_job_that_faults_at_one_step_again_and_again_is_not_started_a_fourth_time(run: Path, clips: Path) -> None:
    ended = {"exit_code": 75, "reason": "rank 3 on n17 is gone", "time_s": 0.0}
    run.mkdir()
    (run / "provenance.json").write_text(json.dumps([{"first_step": 0, "ended": ended}] * 3))
    arguments = [*ENDLESS, "max_steps=1", f"data.root={clips}", f"outputs={run.parent}", f"run_id={run.name}"]
    refused = start_training(World("none", 1), run / "console.txt", *arguments).wait(START_S)
    assert refused.exit_code == 5
    assert "the last 3 starts all began at step 0" in refused.output and "rank 3 on n17 is gone" in refused.output
    arguments.append("checkpoint.allow_no_progress=true")
    allowed = start_training(World("none", 1), run / "console.txt", *arguments).wait(START_S)
    assert allowed.exit_code == 0, allowed.output


# --- Signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "name"),
    [(World("torchrun", 2), "SIGUSR1"), (World("horovodrun", 2), "SIGTERM"), (World("mpirun", 2), "SIGUSR1")],
    ids=name_of,
)
def test_a_signal_to_one_rank_stops_all_behind_one_step_with_a_checkpoint(
    world: World, run: Path, clips: Path, name: str
) -> None:
    """Send the signals with which Slurm warns of a time limit or of preemption; ignore the launcher's own exit code."""
    job = start(available(world), run, clips)
    os.kill(job.ranks()[1], signal.Signals[name])
    ended = job.wait(END_S)
    assert ended.left_running == []
    assert outcome_of(run) | {"time_s": 0} == {"exit_code": 75, "reason": "stopped in good order", "time_s": 0}
    stopped = re.search(rf"stopped by {name} after step (\d+), with a checkpoint", log_of(run))
    assert stopped, ended.output
    step = int(stopped[1])
    assert (run / "checkpoints" / f"step-{step:08d}").is_dir()
    assert f"stopped by {name} after step {step}" in node_log(run.name, 1).read_text()


# 30 views of each clip, and 5 steps before each evaluation.
EVALUATED = (
    "schedule.epochs=2 evaluation=dense_30 evaluation.every_epochs=1 numerics.deterministic=true batch.bn_group=4 "
    "optimizer.ema_decay=0.8"
).split()


@pytest.mark.parametrize(
    ("world", "name"), [(World("torchrun", 2), "SIGTERM"), (World("horovodrun", 2), "SIGUSR1")], ids=name_of
)
def test_a_signal_within_an_evaluation_is_heeded_there_and_costs_no_bit(
    world: World, run: Path, clips: Path, name: str
) -> None:
    """Signals interrupt both evaluations of a run, and the next start makes them. A cluster would not wait for them."""

    def start(folder: Path) -> RunningJob:
        arguments = [*ENDLESS, *EVALUATED, f"data.root={clips}", f"outputs={folder.parent}", f"run_id={folder.name}"]
        folder.mkdir(exist_ok=True)
        return start_training(available(world), folder / "console.txt", *arguments)

    def evaluations(folder: Path) -> list[dict[str, object]]:
        records = [record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "evaluation"]
        return [record | {"time_s": 0, "duration_s": 0} for record in records]

    alone = run.with_name(f"{run.name}-alone")
    ended = start(alone).wait(START_S)
    assert ended.exit_code == 0, ended.output
    for rank, step in ((1, 5), (0, 10)):
        job = start(run)
        wait_for_record(run / "metrics.jsonl", "train", START_S, step)
        time.sleep(0.5)
        os.kill(job.ranks()[rank], signal.Signals[name])
        ended = job.wait(END_S)
        assert ended.left_running == []
        assert len(evaluations(run)) == (step > 5), ended.output
        assert outcome_of(run) | {"time_s": 0} == {"exit_code": 75, "reason": "stopped in good order", "time_s": 0}
        told = f"stopped by {name} after step {step}, with a checkpoint, evaluation still owed"
        assert told in log_of(run) and told in node_log(run.name, 1).read_text()
    ended = start(run).wait(START_S)
    assert ended.exit_code == 0, ended.output
    assert [record["step"] for record in evaluations(run)] == [5, 10]
    assert evaluations(run) == evaluations(alone)
    assert differing(alone, run, step=10) == []


# --- Hangs ------------------------------------------------------------------------------------------------------------

HANG_S = 10
# The hang timeout, the wait for stacks, and the grace that a launcher gives a stopped process (torchrun: 30 s).
HANG_END_S = 4 * HANG_S + 60


def assert_hang_is_named(run: Path, ended: Ended, size: int, culprit: int, where: str) -> str:
    """Assert that the log names the rank and its place before the job ends; return the stacks of all ranks."""
    log = log_of(run)
    assert f"rank {culprit} on {os.uname().nodename} hangs at step" in log, log + ended.output
    assert where in log.split("hangs at")[1], log
    assert outcome_of(run)["exit_code"] == 75, log
    assert ended.left_running == []
    stacks = gathered(run, "stacks.txt")
    for rank in range(size):
        assert f"==== rank {rank} on" in stacks, stacks
    assert stacks.startswith(f"==== rank {culprit} on"), stacks
    return stacks


STOPPED = {World("torchrun", 4): 2, World("horovodrun", 2): 0, World("mpirun", 2): 1}


@pytest.fixture(scope="module")
def stopped_jobs(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Iterator[dict[World, RunningJob]]:
    """Jobs with one stopped rank each, which wait for their hang timeouts in parallel."""
    folder = tmp_path_factory.mktemp("stopped")
    jobs = {}
    for world, victim in STOPPED.items():
        if world.missing is None:
            jobs[world] = start(
                world, folder / f"fault-{os.getpid()}-{world.name}", clips, f"distributed.hang_timeout_s={HANG_S}"
            )
            os.kill(jobs[world].ranks()[victim], signal.SIGSTOP)
    yield jobs
    for job in jobs.values():
        job.kill()


@pytest.mark.parametrize(("stopped_world", "victim"), STOPPED.items(), ids=name_of)
def test_a_stopped_rank_is_named_with_the_stacks_of_all(
    stopped_world: World, victim: int, stopped_jobs: dict[World, RunningJob]
) -> None:
    job = stopped_jobs[available(stopped_world)]
    ended, run = job.wait(HANG_END_S), job.log.parent
    stacks = assert_hang_is_named(run, ended, stopped_world.size, victim, "no heartbeat for")
    assert "T (stopped)" in stacks.split("==== ")[1], stacks
    # torchrun waits 30 s for a stopped process.
    if stopped_world.launcher == "torchrun":
        assert f"rank {victim} on {os.uname().nodename} did not exit within 15 s: killed" in log_of(run)
    assert "training/loop.py" in stacks.split("==== ")[2], stacks


def test_a_loader_that_stands_still_is_named(run: Path, clips: Path) -> None:
    world = World("torchrun", 2)
    job = start(world, run, clips, f"distributed.hang_timeout_s={HANG_S}")
    (worker,) = job.loader_workers(1)
    os.kill(worker, signal.SIGSTOP)
    stacks = assert_hang_is_named(run, job.wait(HANG_END_S), world.size, 1, "phase input")
    mine = stacks.split("==== ")[1]
    assert "dataloader.py" in mine, stacks
    assert f"process {worker}: T (stopped)" in mine, stacks


# In tests/helpers/slow_machine.py a batch takes less; a first step, an evaluation and a checkpoint take more.
SLOW_HANG_S = 8


def test_what_rightly_takes_long_is_no_standstill(run: Path, clips: Path) -> None:
    """A slow first step, precise batch norm, an evaluation and a blocking checkpoint."""
    slow = "schedule.epochs=1 evaluation.every_epochs=1 evaluation.batch=1 batch.precise_bn_steps=8"
    places = [f"data.root={clips}", f"outputs={run.parent}", f"run_id={run.name}"]
    limit = f"distributed.hang_timeout_s={SLOW_HANG_S}"
    run.mkdir()
    arguments = [*ENDLESS, *slow.split(), limit, *places]
    job = start_training(World("torchrun", 2), run / "console.txt", *arguments, program="tests/helpers/slow_machine.py")
    ended = job.wait(START_S)
    assert ended.exit_code == 0, ended.output
    assert (run / "SUCCESS").exists() and not (run / "failures").exists()
    assert "no rank made progress" not in log_of(run)
    records = read_metrics(run / "metrics.jsonl")
    took_s = {record["kind"]: record.get("duration_s", record.get("step_s")) for record in reversed(records)}
    assert min(took_s[kind] for kind in ("train", "evaluation", "checkpoint")) > SLOW_HANG_S, took_s
    at_s = {record["kind"]: record["time_s"] for record in reversed(records)}
    assert at_s["job_start"] < at_s["start"] < at_s["first_step"] < at_s["end"]


@pytest.fixture
def stalling(tmp_path: Path, clips: Path) -> Iterator[tuple[Path, Path]]:
    """Copy of the data set on a file system that blocks while a marker file exists, and the path of the marker."""
    pytest.importorskip("mfusepy", reason="needs the package mfusepy and libfuse (make dev; tools/system_packages.txt)")
    root, mount, marker = tmp_path / "stalling", tmp_path / "mount", tmp_path / "stalled"
    for folder in (root, mount):
        folder.mkdir()
    for manifest in clips.glob("*.*"):
        shutil.copy(manifest, root)
    for split in ("train", "val"):
        (root / split).symlink_to(mount / split)
    server = subprocess.Popen(
        [sys.executable, str(CHECKOUT / "tests/helpers/stalling_fs.py"), str(clips), str(mount), str(marker)]
    )
    deadline_s = time.monotonic() + START_S
    while not mount.is_mount():
        assert server.poll() is None and time.monotonic() < deadline_s, "the file system was not mounted"
        time.sleep(0.1)
    yield root, marker
    marker.unlink(missing_ok=True)
    subprocess.run(["umount", "--lazy", str(mount)], check=True)
    server.wait(30)


def test_a_file_system_that_blocks_is_named(run: Path, stalling: tuple[Path, Path]) -> None:
    """A worker blocked in the kernel cannot be killed, as with a dead file server; the job ends nevertheless."""
    root, marker = stalling
    job = start(World("none", 1), run, root, f"distributed.hang_timeout_s={HANG_S}")
    marker.touch()
    job.process.wait(HANG_END_S)
    marker.unlink()
    stacks = assert_hang_is_named(run, job.wait(END_S), 1, 0, "phase input")
    assert "request_wait_answer" in stacks and "decode_clip" in stacks, stacks
    assert re.search(r"phase input, process \d+ waits for a disk or file server \([SD], in ", log_of(run)), log_of(run)


def test_a_slow_file_system_is_hidden_by_what_is_read_ahead_or_named_with_the_remedy(
    run: Path, stalling: tuple[Path, Path]
) -> None:
    """Opening a file takes 0.01 s, which 4 workers hide (0.02 s per step of 8 clips), then 0.75 s, which they cannot."""
    root, marker = stalling
    marker.write_text("0.01")
    job = start(World("none", 1), run, root, *"logger.every_steps=10 max_steps=90 pipeline.workers=4".split())
    wait_for_record(run / "metrics.jsonl", "train", START_S, step=60)
    marker.write_text("0.75")
    ended = job.wait(START_S)
    assert ended.exit_code == 0, ended.output
    records = read_metrics(run / "metrics.jsonl")
    waits = {record["step"]: record["input_wait_percent"] for record in records if record["kind"] == "train"}
    hidden = [waits[step] for step in (30, 40, 50, 60)]
    assert statistics.median(hidden) < 10 and waits[90] > 40, waits
    said = [line for line in log_of(run).splitlines() if "input-bound: " in line]
    assert "pipeline.workers=" in said[-1] and "prepare.py transcode" in said[-1], said
    (whole,) = (record for record in records if record["kind"] == "input")
    assert min(hidden) < whole["wait_percent"] < waits[90], (whole, waits)
    assert f"input stall: {whole['wait_percent']:.1f}% of the time" in log_of(run)
