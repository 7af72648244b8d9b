"""Run jobs without faults, in which no rank may be reported as a straggler.

    python tests/soak/clean_run.py --steps 1000 --json FILE      torch and Horovod, 2 processes

Run it on an idle machine: another program would slow a rank down and make it a straggler.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.helpers.jobs import make_clips, start_training
from tests.helpers.worlds import World
from training.telemetry.records import read_metrics

LIMIT_S = 1800.0
WORLDS = (World("torchrun", 2), World("horovodrun", 2))

RUN = (
    "experiment=smoke logger=disabled logger.every_steps=10 pipeline.size=24 model.num_frames=4 pipeline.decoder=pyav "
    "pipeline.workers=0 batch.global_batch=4 batch.bn_group=1 schedule.warmup_epochs=0 schedule.epochs=1000 "
    "evaluation.every_epochs=10000 checkpoint.every_epochs=10000"
).split()


@dataclass(frozen=True)
class Clean:
    """A run, and the number of its straggler records."""

    world: str
    steps: int
    named: int
    step_s: float


def clean_run(world: World, folder: Path, clips: Path, steps: int) -> Clean:
    arguments = [*RUN, f"max_steps={steps}", f"data.root={clips}", f"outputs={folder}", f"run_id={world.name}"]
    ended = start_training(world, folder / f"{world.name}.txt", *arguments).wait(LIMIT_S)
    assert ended.exit_code == 0, ended.output[-5000:]
    records = read_metrics(folder / world.name / "metrics.jsonl")
    trained = [record for record in records if record["kind"] == "train"]
    named = sum(record["kind"] == "straggler" for record in records)
    step_s = sum(record["step_s"] for record in trained) / len(trained)
    return Clean(world.name, trained[-1]["step"], named, round(step_s, 4))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was seen to FILE")
    options = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory(prefix="clean-run-") as name:
        clips = make_clips(Path(name) / "clips")
        for world in WORLDS:
            run = clean_run(world, Path(name), clips, options.steps)
            runs.append(run)
            print(f"{run.world:13s} {run.steps} steps of {run.step_s:.3f} s: {run.named} ranks named", flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n")
    return 1 if any(run.named for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
