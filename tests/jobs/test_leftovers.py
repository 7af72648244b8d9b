"""A job of which every process is killed at once: the next start on the machine removes what it left."""

import os
import signal
from pathlib import Path

import pytest

from tests.helpers.jobs import make_clips, start_training, wait_for_record
from tests.helpers.worlds import World

pytestmark = pytest.mark.slow

# Allows for a busy machine.
LIMIT_S = 180

SHORT = (
    "experiment=smoke logger=disabled logger.every_steps=1 pipeline.size=32 model.num_frames=4 pipeline.decoder=pyav "
    "batch.global_batch=8 schedule.warmup_epochs=0 evaluation.every_epochs=10000 checkpoint.every_epochs=10000"
).split()


def semaphores(folders: list[Path]) -> list[Path]:
    return [found for folder in folders for found in Path("/dev/shm").glob(f"sem.{folder.name}-*")]


@pytest.mark.parametrize("world", [World("none", 1), World("local", 2)], ids=lambda world: world.launcher)
def test_the_next_start_removes_what_a_killed_job_left(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "t"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    arguments = [*SHORT, f"data.root={make_clips(tmp_path / 'clips')}", f"outputs={tmp_path}", "run_id=killed"]
    job = start_training(world, tmp_path / "first.txt", *arguments, "schedule.epochs=4000")
    try:
        wait_for_record(tmp_path / "killed" / "metrics.jsonl", "train", LIMIT_S)
        in_use = list(temporary.glob("pymp-*"))
        assert semaphores(in_use), "semaphores are not named after the folder"
        for pid in job.processes():
            # None may end before it is killed, or it would clean up.
            os.kill(pid, signal.SIGSTOP)
        job.kill()
    finally:
        job.wait(LIMIT_S)
    left = list(temporary.glob("pymp-*")) + list(temporary.glob("tsm-local-*"))
    assert len(left) == world.size + (world.launcher == "local")
    assert semaphores(left)

    job = start_training(world, tmp_path / "second.txt", *arguments, "schedule.epochs=1", "run_id=next")
    ended = job.wait(LIMIT_S)
    assert ended.exit_code == 0, ended.output
    assert [path for path in temporary.iterdir() if path.name.startswith(("pymp-", "tsm-local-"))] == []
    assert semaphores(left) == []
