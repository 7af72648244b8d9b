"""Two jobs of one run: one trains, the other is refused; the lock of a killed job does not hold up the next start."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from runtime import run_layout
from runtime.lease import identity
from tests.helpers.jobs import make_clips, start_training, wait_for_record
from tests.helpers.worlds import World

pytestmark = pytest.mark.slow

# Allows for a busy machine.
START_S = 180
END_S = 60

ENDLESS = (
    "experiment=smoke logger=disabled logger.every_steps=1 pipeline.workers=0 pipeline.size=32 model.num_frames=4 "
    "pipeline.decoder=pyav batch.global_batch=8 schedule.warmup_epochs=0 schedule.epochs=4000 evaluation.every_epochs=10000 "
    "checkpoint.every_epochs=10000 checkpoint.every_steps=1"
).split()


def test_one_of_two_starts_trains_and_a_third_resumes_after_its_death(tmp_path: Path) -> None:
    clips, run = make_clips(tmp_path / "clips"), tmp_path / "x"
    arguments = [*ENDLESS, f"data.root={clips}", f"outputs={tmp_path}", "run_id=x"]
    jobs = [start_training(World("none", 1), tmp_path / f"{name}.txt", *arguments) for name in "ab"]
    try:
        deadline_s = time.monotonic() + START_S
        while not (ended := [job for job in jobs if job.process.poll() is not None]):
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
        (loser,) = ended
        (winner,) = [job for job in jobs if job is not loser]
        refused = loser.wait(END_S)
        assert refused.exit_code == 2, refused.output
        assert f"{run} is in use by process {winner.process.pid} on " in refused.output
        assert refused.output.strip().endswith("Fix: wait for its end, stop it, or run_id=ANOTHER")

        wait_for_record(run / "metrics.jsonl", "checkpoint", START_S, step=2)
        os.kill(winner.process.pid, signal.SIGKILL)
        assert winner.wait(END_S).exit_code == -signal.SIGKILL
        assert "NO CHECKPOINT" not in winner.log.read_text()

        third = start_training(World("none", 1), tmp_path / "c.txt", *arguments)
        jobs.append(third)
        before = (run / "metrics.jsonl").read_text().count('"kind": "train"')
        deadline_s = time.monotonic() + START_S
        while (run / "metrics.jsonl").read_text().count('"kind": "train"') == before:
            assert time.monotonic() < deadline_s, third.log.read_text()
            time.sleep(0.1)
        said = third.log.read_text()
        assert f"run folder: took over {run} from process {winner.process.pid} on " in said
        assert re.search(r"resuming x from step [1-9]", said)

        # As if another node had waited for this job's sign of life, and gone on without it.
        other = json.dumps({**json.loads(identity()), "machine": "another", "host": "n17", "pid": 4711})
        (run / run_layout.LOCK).write_text(other)
        lost = third.wait(END_S)
        assert lost.exit_code == 2, lost.output
        assert f"{run} was taken over by process 4711 on n17" in lost.output
        assert (run / run_layout.LOCK).read_text() == other
    finally:
        for job in jobs:
            job.kill()
