"""Stop signals in real jobs before the first step: the documented codes, and the outcome in the run folder."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.jobs import RunningJob, make_clips, start_training
from tests.helpers.worlds import World, available

pytestmark = pytest.mark.slow

LIMIT_S = 120

SMALL = (
    "experiment=smoke logger=disabled pipeline.size=32 model.num_frames=4 pipeline.decoder=pyav pipeline.workers=0 "
    "batch.global_batch=8 schedule.warmup_epochs=0 schedule.epochs=4000 evaluation.every_epochs=9999 run_id=early"
).split()


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clips(tmp_path_factory.mktemp("early") / "clips")


def wait_for_folder(job: RunningJob, folder: Path) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not (folder / "config.yaml").exists():
        assert job.process.poll() is None and time.monotonic() < deadline_s, job.log.read_text()
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("world", "name", "code"),
    [(World("none", 1), "SIGINT", 130), (World("torchrun", 2), "SIGUSR1", 75), (World("mpirun", 2), "SIGTERM", 75)],
    ids=str,
)
def test_a_signal_once_the_run_folder_is_there(world: World, name: str, code: int, tmp_path: Path, clips: Path) -> None:
    arguments = [*SMALL, f"data.root={clips}", f"outputs={tmp_path}"]
    job = start_training(available(world), tmp_path / "log.txt", *arguments)
    wait_for_folder(job, tmp_path / "early")
    started_s = time.monotonic()
    os.kill(job.ranks()[world.size - 1], signal.Signals[name])
    ended = job.wait(LIMIT_S)
    assert ended.left_running == []
    assert time.monotonic() - started_s < 30
    assert ended.exit_code == code if world.launcher == "none" else ended.exit_code != 0, ended.output
    outcome = json.loads((tmp_path / "early" / "outcome.json").read_text())
    assert outcome["exit_code"] == code, outcome
