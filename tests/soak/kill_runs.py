"""Kill runs at random moments, restart them until they are done, and compare them with an uninterrupted run.

    python tests/soak/kill_runs.py --kills 50 --json FILE      `make faults`: torch and Horovod, 2 and 4 processes

A kill sends SIGKILL to one process of the job: a rank or one of its loader workers. The moment is random within a
randomly chosen phase: start-up, a step, a checkpoint write or an evaluation.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.helpers.jobs import Ended, RunningJob, differing, make_clips, start_training
from tests.helpers.worlds import World
from training.telemetry.records import read_metrics

# Per start, on a busy machine.
LIMIT_S = 300.0
# Time for a job to end after a kill.
END_S = 60.0
PHASES = ("start", "step", "checkpoint", "evaluation")
WORLDS = (World("torchrun", 2), World("horovodrun", 2), World("torchrun", 4), World("horovodrun", 4))

RUN = (
    "experiment=smoke logger=disabled logger.every_steps=1 pipeline.size=24 model.num_frames=4 pipeline.decoder=pyav "
    "batch.global_batch=8 batch.bn_group=4 schedule.epochs=4 schedule.warmup_epochs=0 evaluation.every_epochs=1 evaluation.batch=4 "
    "checkpoint.every_steps=2 checkpoint.allow_no_progress=true numerics.deterministic=true distributed.hang_timeout_s=120"
).split()
# 40 clips, 8 per step, 4 epochs.
STEPS = 20


@dataclass(frozen=True)
class Kill:
    """A kill of a start, and its outcome."""

    world: str
    phase: str
    victim: str
    from_step: int
    at_step: int
    """The last step with a record at the time of the kill."""
    ended_s: float
    outcome: str


class Run:
    """One run in its own folder, in one world."""

    def __init__(self, world: World, folder: Path, clips: Path) -> None:
        self.world, self.folder, self._clips = world, folder, clips
        folder.mkdir(parents=True)
        self._starts = 0

    def start(self) -> RunningJob:
        self._starts += 1
        arguments = [*RUN, f"data.root={self._clips}", f"outputs={self.folder.parent}", f"run_id={self.folder.name}"]
        return start_training(self.world, self.folder / f"console-{self._starts}.txt", *arguments)

    def newest_step(self, kind: str) -> int:
        metrics = self.folder / "metrics.jsonl"
        records = read_metrics(metrics) if metrics.exists() else []
        return max((record["step"] for record in records if record["kind"] == kind), default=0)

    def first_step(self) -> int:
        """Return the step from which the newest start resumed."""
        provenance = self.folder / "provenance.json"
        return int(json.loads(provenance.read_text())[-1]["first_step"]) if provenance.exists() else 0

    @property
    def done(self) -> bool:
        return (self.folder / "SUCCESS").exists()


def undisturbed(world: World, folder: Path, clips: Path) -> Run:
    run = Run(world, folder, clips)
    ended = run.start().wait(LIMIT_S)
    assert run.done, ended.output[-5000:]
    return run


def killed_and_resumed(
    world: World, folder: Path, clips: Path, kills: int, dice: random.Random, tell: Callable[[Kill], None]
) -> Run:
    """Kill a run so many times, once per start, then let it finish; kill it fewer times if it finishes earlier."""
    run = Run(world, folder, clips)
    for _ in range(kills):
        job = run.start()
        kill = _kill_in(run, job, dice)
        # The run finished before the kill.
        if kill is None:
            break
        tell(kill)
    while not run.done:
        ended = run.start().wait(LIMIT_S)
        assert ended.exit_code == 0, ended.output[-5000:]
    return run


def _kill_in(run: Run, job: RunningJob, dice: random.Random) -> Kill | None:
    phase = dice.choice(PHASES)
    if not _wait_for(run, job, phase, dice):
        ended = job.wait(LIMIT_S)
        assert run.done, ended.output[-5000:]
        return None
    ranks = job.ranks()
    rank = dice.choice(sorted(ranks)) if ranks else -1
    workers = job.loader_workers(rank) if rank >= 0 else []
    pid, victim = ranks.get(rank, job.process.pid), f"rank {rank}" if ranks else "launcher"
    if workers and dice.random() < 0.2:
        pid, victim = workers[0], f"loader worker of rank {rank}"
    from_step, at_step = run.first_step(), run.newest_step("train")
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        victim += " (which had just ended)"
    ended = job.wait(END_S)
    assert ended.left_running == [], ended.left_running
    return Kill(run.world.name, phase, victim, from_step, at_step, round(ended.duration_s, 1), _outcome(run, ended))


def _wait_for(run: Run, job: RunningJob, phase: str, dice: random.Random) -> bool:
    """Wait for a random moment of a phase; return False if the run ended before."""
    deadline_s = time.monotonic() + LIMIT_S
    if phase == "start":
        time.sleep(dice.uniform(0.5, 15.0))
        return job.process.poll() is None
    target = dice.randint(min(run.newest_step("train") + 1, STEPS), STEPS)
    while time.monotonic() < deadline_s and job.process.poll() is None:
        step = run.newest_step("train")
        writing = any((run.folder / "checkpoints").glob(".step-*.part"))
        evaluating = step > 0 and step % 5 == 0 and run.newest_step("evaluation") < step
        if step >= target and {"step": True, "checkpoint": writing, "evaluation": evaluating}[phase]:
            time.sleep(dice.uniform(0.0, 0.3 if phase == "step" else 0.05))
            return job.process.poll() is None
        time.sleep(0.01)
    return False


def _outcome(run: Run, ended: Ended) -> str:
    outcome = run.folder / "outcome.json"
    return (
        json.loads(outcome.read_text())["reason"]
        if outcome.exists()
        else f"none; the launcher ended with {ended.exit_code}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write each kill to FILE")
    options = parser.parse_args()
    dice = random.Random(options.seed)
    kills: list[Kill] = []

    def tell(kill: Kill) -> None:
        kills.append(kill)
        print(
            f"{len(kills):3d}  {kill.world:13s} {kill.phase:11s} {kill.victim:24s} step {kill.from_step:2d} to {kill.at_step:2d}  "
            f"ended in {kill.ended_s:4.1f} s: {kill.outcome[:100]}",
            flush=True,
        )

    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="kill-runs-") as name:
        clips = make_clips(Path(name) / "clips")
        left_alone = {world: undisturbed(world, Path(name) / f"alone-{world.name}", clips) for world in WORLDS}
        runs = 0
        while len(kills) < options.kills:
            world = WORLDS[runs % len(WORLDS)]
            runs += 1
            quota = min(4, options.kills - len(kills))
            run = killed_and_resumed(world, Path(name) / f"killed-{runs}", clips, quota, dice, tell)
            found = differing(run.folder, left_alone[world].folder, STEPS)
            wrong += [f"run {runs} ({world.name}): {tensor}" for tensor in found]
            shutil.rmtree(run.folder)
    print(f"\n{len(kills)} kills in {runs} runs, {dict(Counter(kill.phase for kill in kills))}")
    print("every run ended bit-equal to the one left alone" if not wrong else f"NOT EQUAL: {wrong}")
    if options.json:
        options.json.write_text(json.dumps([asdict(kill) for kill in kills], indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
