"""Ranks that die or hang, in real jobs on every backend: everyone ends, and says who it was."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import RunningJob, start_training, wait_for_record
from worlds import CHECKOUT, World, available

from distributed.journal import node_log

pytestmark = pytest.mark.slow

START_S = 180  # on a busy machine
END_S = 30

ENDLESS = (
    "experiment=smoke logger=disabled logger.every_steps=1 pipeline.size=32 model.num_frames=4 pipeline.decoder=pyav "
    "batch.global_batch=8 schedule.warmup_epochs=0 schedule.epochs=4000 evaluation.every_epochs=10000 "
    "checkpoint.every_epochs=10000"
).split()

WORLDS = [World("torchrun", 4), World("horovodrun", 4), World("mpirun", 4)]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faults") / "clips"
    command = [sys.executable, "prepare.py", "shapes", "--root", str(root), "--train-clips", "40", "--val-clips", "20"]
    subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True)
    return root


@pytest.fixture(params=WORLDS, ids=lambda world: world.name)
def world(request: pytest.FixtureRequest) -> World:
    return available(request.param)


def start(world: World, folder: Path, clips: Path, *overrides: str) -> RunningJob:
    """A job that has taken its first steps and would go on for ever."""
    arguments = [*ENDLESS, f"data.root={clips}", f"outputs={folder.parent}", f"run_id={folder.name}", *overrides]
    folder.mkdir(exist_ok=True)
    job = start_training(world, folder / "console.txt", *arguments)
    wait_for_record(folder / "metrics.jsonl", "train", START_S)
    return job


def log_of(run: Path) -> str:
    return (run / "log.txt").read_text()


def gathered(run: Path, name: str) -> str:
    """What was gathered when the job failed, under this name."""
    (path,) = run.glob(f"failures/*/{name}")
    return path.read_text()


def outcome_of(run: Path) -> dict[str, object]:
    outcome: dict[str, object] = json.loads((run / "outcome.json").read_text())
    return outcome


@pytest.fixture
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A run folder that no other test's has the name of: logs of nodes go by it."""
    return tmp_path / f"fault-{os.getpid()}-{tmp_path.parent.name}-{tmp_path.name}"


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_ends_the_job_and_is_named_by_all(world: World, run: Path, clips: Path, victim: int) -> None:
    job = start(world, run, clips)
    os.kill(job.ranks()[victim], signal.SIGKILL)
    ended = job.wait(END_S)
    assert ended.left_running == []
    assert ended.exit_code != 0
    verdict = f"rank {victim} on {os.uname().nodename} is gone"
    assert verdict in log_of(run), ended.output
    assert outcome_of(run)["exit_code"] == 75, ended.output
    for rank in range(1, world.size):
        if rank != victim:
            log = gathered(run, f"rank-{rank:05d}.log") if victim != 0 else node_log(run.name, rank).read_text()
            assert verdict in log, log + ended.output
    if victim != 0:  # the dead cannot send theirs: a neighbour does
        assert "step      1" in gathered(run, f"rank-{victim:05d}.log")
