"""Kill checkpoint writes at each of their system calls; test_checkpoint_kills.py starts this program.

    python tests/helpers/checkpoint_kills.py FOLDER SCENE    prints a JSON list, one entry for each kill

Each kill forks a child. The child counts its system calls that change files and sends itself SIGKILL before the N-th
call. In a write it may also die after some of the bytes. The kernel keeps what it received before a kill.
"""

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from distributed.checkpoint import store
from distributed.checkpoint.store import (
    BEST,
    Checkpoint,
    CheckpointError,
    Snapshot,
    load_checkpoint,
    load_newest,
    write_snapshot,
)
from distributed.checkpoint.writer import CheckpointWriter

CALLS = ("open", "mkdir", "write", "fsync", "rename", "replace", "symlink", "unlink", "rmdir")
# Kills within each write, in addition to the one before it.
CUTS = 6


def checkpoint(step: int, mark: int = 0) -> Checkpoint:
    """Return a checkpoint with tensors made from (step, mark); `mark` distinguishes checkpoints of the same step."""
    values = torch.arange(400, dtype=torch.float32) + 1000 * step + 100_000 * mark
    state = {"step": step, "mark": mark, "recipe": {}}
    return Checkpoint({"weight": values, "count": torch.tensor(step)}, {"weight.momentum_buffer": -values}, state)


def is_whole(found: Checkpoint) -> bool:
    expected = checkpoint(found.state["step"], found.state["mark"])
    return all(
        ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in theirs)
        for ours, theirs in ((found.network, expected.network), (found.optimizer, expected.optimizer))
    )


def arm(number: int, part: float | None, told: int) -> None:
    """Arrange a SIGKILL of this process before its call `number`, or within it if it is a write.

    `part` is the fraction of the write's bytes that is written before the kill. The pipe `told` receives the call's
    name.
    """
    calls, tell = 0, os.write

    def armed(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            if name == "open" and not arguments[1] & os.O_CREAT:
                return real(*arguments, **options)
            calls += 1
            if calls == number:
                tell(told, name.encode())
                if part is not None and name == "write":
                    descriptor, content = arguments
                    real(descriptor, content[: int(part * len(content))])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    for name in CALLS:
        setattr(os, name, armed(name, getattr(os, name)))


def write_behind(folder: Path, new: Checkpoint, best: bool) -> None:
    """Write in the writer's thread, as training does."""
    writer = CheckpointWriter(folder, keep=2)
    writer.save(new, best)
    writer.wait()
    assert [written.failed for written in writer.ended()] == [None]


def write_at_once(folder: Path, new: Checkpoint, best: bool) -> None:
    write_snapshot(folder, Snapshot().take(new), keep=1, best=best)


# Name -> (checkpoints present before, checkpoint to write, function that writes it).
SCENES: dict[str, tuple[list[tuple[int, bool]], Checkpoint, Callable[[Path, Checkpoint, bool], None]]] = {
    "first": ([], checkpoint(1), write_at_once),
    "next": ([(1, False)], checkpoint(2), write_at_once),
    "same step": ([(2, False)], checkpoint(2, mark=1), write_at_once),
    "behind": ([(1, True), (2, False), (3, False)], checkpoint(4), write_behind),
}


def main(folder: Path, scene: str) -> int:
    torch.set_num_threads(1)
    # Small chunks, so that each file takes several writes.
    store.CHUNK_BYTES = 700
    before, new, write = SCENES[scene]
    prepared, live = folder / "prepared", folder / "live"
    prepared.mkdir(parents=True)
    for step, best in before:
        write_snapshot(prepared, Snapshot().take(checkpoint(step)), keep=3, best=best)
    draw, kills, number, during = random.Random(0), [], 0, "the start"
    while during:
        number += 1
        for part in (None, *(draw.random() for _ in range(CUTS))):
            shutil.rmtree(live, ignore_errors=True)
            shutil.copytree(prepared, live, symlinks=True)
            during = killed(live, number, part, write, new)
            if during:
                kills.append({"call": number, "during": during, "part": part} | looked_at(live))
            if during != "write":
                # Only writes can be cut in part.
                break
    print(json.dumps(kills))
    return 0


def killed(folder: Path, number: int, part: float | None, write: Any, new: Checkpoint) -> str:
    """Write in a child that is killed; return the name of the call it died in, or "" if it made fewer calls and finished."""
    hears, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            arm(number, part, told)
            write(folder, new, True)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(told)
    with os.fdopen(hears) as pipe:
        during = pipe.read()
    _, status = os.waitpid(child, 0)
    ended_as_told = os.WIFSIGNALED(status) if during else os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
    if not ended_as_told:
        raise RuntimeError(f"the writer ended with status {status}, killed in {during!r}")
    return during


def looked_at(folder: Path) -> dict[str, Any]:
    """Return what a restarted run finds after the kill, and the files present after it has saved again."""
    loaded, broken = load_newest(folder)
    best = folder / BEST
    try:
        best_is_whole = not best.is_symlink() or is_whole(load_checkpoint(best))
    except CheckpointError:
        best_is_whole = False
    found = {
        "step": None if loaded is None else loaded.state["step"],
        "mark": None if loaded is None else loaded.state["mark"],
        "whole": loaded is None or is_whole(loaded),
        "broken": broken,
        "best_is_whole": best_is_whole,
    }
    write_snapshot(folder, Snapshot().take(checkpoint(9)), keep=1, best=True)
    return found | {"left": sorted(path.name for path in folder.iterdir())}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
