"""Measure the time to 95% top-1 on the generated clips, two processes: train.py against a plain torchvision-style DDP loop.

python benchmarks/end_to_end.py                  5 pairs of runs in turns, of 6 epochs each
python benchmarks/end_to_end.py --quick          a pair of one epoch each: only shows that it works
python benchmarks/end_to_end.py --target 90 --rounds 3 --json FILE

Both take the same clips, network, batch, optimizer, schedule and number of loader workers, and evaluate after each epoch. The time
is from the launch of the processes to the end of the evaluation, imports included. benchmarks/ddp_peer.py is the plain loop.
"""
# ruff: noqa: E402  (the packages of the checkout can be imported only after sys.path is set below)

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parent.parent)  # the checkout instead of this folder

from benchmarks import common
from runtime.checkout import CHECKOUT
from training.telemetry.records import read_metrics

PROCESSES = 2
PEER = Path(__file__).with_name("ddp_peer.py")


@dataclass(frozen=True)
class Evaluated:
    """An evaluation of a run: seconds since its launch, and its accuracy."""

    time_s: float
    top1_percent: float


def evaluated(records: Path, launched_s: float) -> list[Evaluated]:
    """Return the evaluations in a file of records; both programs write `kind`, `time_s` and `top1_percent`."""
    return [
        Evaluated(record["time_s"] - launched_s, record["top1_percent"])
        for record in read_metrics(records)
        if record["kind"] == "evaluation"
    ]


def time_to(target_percent: float, found: list[Evaluated]) -> float | None:
    """Return when the first evaluation reached the target; None if none did."""
    return next((each.time_s for each in found if each.top1_percent >= target_percent), None)


def run_ours(seed: int, epochs: int, threads: int, folder: Path) -> list[Evaluated]:
    """Train with train.py under launch/local.py, two processes over torch's Gloo."""
    overrides = [
        "experiment=smoke", "distributed=torch", "logger=disabled", "evaluation.every_epochs=1", f"seed={seed}",
        f"schedule.epochs={epochs}", f"outputs={folder}", "run_id=ours",
    ]  # fmt: skip
    command = [sys.executable, "launch/local.py", "--processes", str(PROCESSES), "train.py", *overrides]
    launched_s = time.time()
    common.run_child(command, folder / "ours.log", {"OMP_NUM_THREADS": str(threads)})
    return evaluated(folder / "ours" / "metrics.jsonl", launched_s)


def run_peer(seed: int, epochs: int, threads: int, folder: Path) -> list[Evaluated]:
    """Train with the plain loop under torchrun."""
    records = folder / "peer.jsonl"
    command = [*common.launch_command("torch", PROCESSES, str(PEER)), str(seed), str(epochs), str(records)]
    launched_s = time.time()
    common.run_child(command, folder / "peer.log", {"OMP_NUM_THREADS": str(threads)})
    return evaluated(records, launched_s)


RUNS: dict[str, Callable[[int, int, int, Path], list[Evaluated]]] = {"ours": run_ours, "peer": run_peer}


def take_turns(rounds: int, epochs: int, threads: int) -> dict[str, list[list[Evaluated]]]:
    """Run both in turns, a seed per round, and print a line per run."""
    found: dict[str, list[list[Evaluated]]] = {name: [] for name in RUNS}
    for seed in range(rounds):
        for name, run in RUNS.items():
            with tempfile.TemporaryDirectory() as folder:
                result = run(seed, epochs, threads, Path(folder))
            found[name].append(result)
            scores = " ".join(f"{each.top1_percent:.1f}% at {each.time_s:.0f} s" for each in result)
            print(f"seed {seed}  {name}  {scores}", flush=True)
    return found


def row_of(found: dict[str, list[list[Evaluated]]], target_percent: float, epochs: int) -> dict[str, Any]:
    """Return the row of all pairs. Pairs in which a run missed the target have no ratio, and are counted."""
    times = {name: [time_to(target_percent, each) for each in results] for name, results in found.items()}
    pairs = [(ours, peer) for ours, peer in zip(times["ours"], times["peer"], strict=True) if ours and peer]
    row: dict[str, Any] = {
        "benchmark": "end_to_end",
        "processes": PROCESSES,
        "target_percent": target_percent,
        "epochs": epochs,
        "rounds": len(times["ours"]),
        "missed": {name: sum(time_s is None for time_s in values) for name, values in times.items()},
        "evaluations": {name: [[asdict(each) for each in run] for run in results] for name, results in found.items()},
    }
    if pairs:
        ours_s, peer_s = zip(*pairs, strict=True)
        row |= {
            "ours_s": common.median_interval(ours_s),
            "peer_s": common.median_interval(peer_s),
            "time_ratio": common.ratio_interval(ours_s, peer_s),
        }
    return row


def parse_arguments() -> argparse.Namespace:
    parser = common.argument_parser("Time to an accuracy on the generated clips, against a plain DDP loop.")
    parser.add_argument("--target", type=float, default=95.0, help="top-1 in percent")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of runs")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of a run")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process")
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    if options.quick:
        # One epoch cannot reach 95%.
        options.rounds, options.epochs, options.target = 1, 1, 0.0
    if not (CHECKOUT / "data/shapes/train.arrow").exists():
        print("end_to_end: no clips. Fix: python prepare.py shapes", file=sys.stderr)
        return 2
    facts = common.machine_facts(options.threads)
    row = row_of(take_turns(options.rounds, options.epochs, options.threads), options.target, options.epochs)
    print(f"\n{facts['cpu']}, {facts['cores']} cores, load {facts['load']}; torch {facts['torch']}; {facts['date']}")
    if "time_ratio" in row:
        titles = (f"time to {options.target:g}%", "ours [s]", "plain DDP loop [s]", "ratio")
        common.print_table(titles, [["", row["ours_s"].show(), row["peer_s"].show(), row["time_ratio"].show(digits=3)]])
    print(f"runs that missed {options.target:g}%: {json.dumps(row['missed'])}")
    if options.json:
        common.write_rows(options.json, [row], facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
