"""A kill -9 at any point of a checkpoint write leaves the old or the new checkpoint, complete (see checkpoint_kills.py)."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distributed.checkpoint.store import load_newest
from tests.helpers.checkpoint_kills import BEST, CALLS, SCENES, is_whole
from tests.helpers.worlds import CHECKOUT

pytestmark = pytest.mark.slow

# Checkpoint found before and after the write: (step, mark); None if nothing is saved yet.
OLD_AND_NEW: dict[str, tuple[tuple[int, int] | None, tuple[int, int]]] = {
    "first": (None, (1, 0)),
    "next": ((1, 0), (2, 0)),
    "same step": ((2, 0), (2, 1)),
    "behind": ((3, 0), (4, 0)),
}


def kills_of(folder: Path, scene: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(CHECKOUT / "tests/helpers/checkpoint_kills.py"), str(folder), scene]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    kills: list[dict[str, Any]] = json.loads(done.stdout)
    return kills


@pytest.mark.parametrize("scene", SCENES)
def test_a_kill_at_every_call_leaves_the_old_or_the_new_one(tmp_path: Path, scene: str) -> None:
    kills = kills_of(tmp_path, scene)
    old, new = OLD_AND_NEW[scene]
    seen = []
    for kill in kills:
        found = None if kill["step"] is None else (kill["step"], kill["mark"])
        assert found in (old, new) and kill["whole"] and kill["broken"] == [] and kill["best_is_whole"], kill
        # No files of the killed write remain.
        assert kill["left"] == [BEST, "step-00000009"], kill
        seen.append(found)
    # Once the new checkpoint exists, it stays.
    assert seen == sorted(seen, key=lambda found: found == new)
    assert {old, new} == set(seen)
    assert {kill["during"] for kill in kills} == set(CALLS) - ({"rmdir"} if scene == "first" else set())
    assert sum(kill["part"] is not None for kill in kills) > 40


WRITER = """
import sys
sys.path.insert(0, ".")
from pathlib import Path
from tests.helpers.checkpoint_kills import checkpoint
from distributed.checkpoint.writer import CheckpointWriter
writer = CheckpointWriter(Path(sys.argv[1]), keep=2)
print("ready", flush=True)
for step in range(int(sys.argv[2]), 10_000_000):
    writer.save(checkpoint(step), best=step % 3 == 0)
"""


def test_kills_from_outside_at_random_moments(tmp_path: Path) -> None:
    """The writer is killed and restarted repeatedly; no saved checkpoint is lost."""
    draw, newest, processes = random.Random(1), 0, 8
    for _ in range(processes):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(newest + 1)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, cwd=CHECKOUT, env=environment, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            # On a busy machine the time below is too short for some.
            deadline_s = time.monotonic() + 60
            while not any(int(saved.name[5:]) > newest + 2 for saved in tmp_path.glob("step-*")):
                assert time.monotonic() < deadline_s, "no checkpoint"
                time.sleep(0.01)
            time.sleep(draw.uniform(0.2, 0.7))
            process.send_signal(signal.SIGKILL)
        loaded, broken = load_newest(tmp_path)
        assert loaded is not None and is_whole(loaded) and broken == []
        assert loaded.state["step"] > newest
        newest = loaded.state["step"]
    assert newest > 2 * processes
