"""Find how far the batch can grow at the same number of epochs: plain SGD, SGD with linear scaling and warm-up, and LARS.

python benchmarks/large_batch.py --json FILE --plot FILE      all runs, hours; restarted after a stop, it resumes
python benchmarks/large_batch.py --quick                      a check that it works

Each run is a `train.py experiment=large_batch` on one thread with its own folder under `outputs/large_batch`. It trains a TSM on
generated clips. Batch norm has groups of 8 clips at every batch size, as on the 1,536 GPUs (arXiv:1910.00932).
"""
# ruff: noqa: E402  (the packages of the checkout can be imported only after sys.path is set below)

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parent.parent)  # the checkout instead of this folder

from benchmarks import common
from runtime import run_layout
from runtime.exit_codes import EXIT_DIVERGED, EXIT_DONE
from training.report.charts import BLUE, GREEN, ORANGE, add_legend, new_chart
from training.telemetry.records import read_metrics

CHECKOUT = Path(__file__).parent.parent
DATA = ("data/shapes_large", "--train-clips", "4100", "--val-clips", "400")
BATCHES = (8, 32, 128, 512)
SEEDS = (0, 1, 2)
CHANCE_PERCENT = 10.0

METHODS = {
    "SGD": ["optimizer.scaling=none"],
    "SGD, linear scaling, warm-up": ["optimizer.scaling=linear", "schedule.warmup_epochs=1"],
    # Tuned at batch 512 with seed 0; square-root scaling gives the rate for the other batches.
    "LARS": [
        *("optimizer=lars", "optimizer.lr=1.0", "optimizer.trust_coefficient=0.02", "schedule.warmup_epochs=1"),
        *("optimizer.base_batch=512", "optimizer.scaling=sqrt"),
    ],
}
"""Overrides of conf/experiment/large_batch.yaml."""
COLOURS = dict(zip(METHODS, (ORANGE, BLUE, GREEN), strict=True))


@dataclass(frozen=True)
class Run:
    """One training run: a method of METHODS, a batch size, and a seed for weights, clip order and augmentation."""

    method: str
    batch: int
    seed: int

    @property
    def name(self) -> str:
        return f"{list(METHODS).index(self.method)}-{self.batch}-{self.seed}"


@dataclass(frozen=True)
class Result:
    """Outcome of a run. `top1_percent` is the final validation accuracy; chance level if it diverged (non-finite gradients)."""

    run: Run
    steps: int
    peak_rate: float
    top1_percent: float
    diverged: bool


def train(run: Run, outputs: Path, others: Sequence[str]) -> Result:
    """Start or resume a run, or read its finished result. Raises ChildFailed if it failed otherwise than by divergence."""
    overrides = [f"batch.global_batch={run.batch}", f"seed={run.seed}", *METHODS[run.method], *others]
    command = [sys.executable, "train.py", "experiment=large_batch", *overrides]
    log = outputs / f"{run.name}.log"
    with log.open("a") as output:
        done = subprocess.run(
            [*command, f"outputs={outputs}", f"run_id={run.name}"],
            cwd=CHECKOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    if done.returncode not in (EXIT_DONE, EXIT_DIVERGED):
        raise common.ChildFailed(f"{run} ended with {done.returncode}:\n{log.read_text()[-3000:]}")
    records = read_metrics(outputs / run.name / run_layout.METRICS)
    (start,) = [record for record in records if record["kind"] == "start"][-1:]
    scores = [record["top1_percent"] for record in records if record["kind"] == "evaluation"][-1:]
    return Result(
        run,
        steps=start["schedule"]["total_steps"],
        peak_rate=start["schedule"]["peak"],
        top1_percent=scores[0] if scores else CHANCE_PERCENT,
        diverged=done.returncode == EXIT_DIVERGED,
    )


def train_all(runs: Sequence[Run], outputs: Path, jobs: int, others: Sequence[str]) -> list[Result]:
    """Run all, `jobs` at a time, and print a line as each ends."""

    def one(run: Run) -> Result:
        result = train(run, outputs, others)
        print(
            f"{run.method:30s} batch {run.batch:4d}  seed {run.seed}  {result.steps:5d} steps  "
            f"{'diverged' if result.diverged else f'{result.top1_percent:5.1f}%'}",
            flush=True,
        )
        return result

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, runs))


def rows_of(results: Sequence[Result]) -> list[dict[str, Any]]:
    rows = []
    for method in METHODS:
        for batch in sorted({result.run.batch for result in results}):
            of_setting = [result for result in results if (result.run.method, result.run.batch) == (method, batch)]
            top1 = [result.top1_percent for result in of_setting]
            rows.append(
                {
                    "benchmark": "large_batch",
                    "method": method,
                    "batch": batch,
                    "steps": of_setting[0].steps,
                    "peak_rate": of_setting[0].peak_rate,
                    "top1_percent": top1,
                    "mean_top1_percent": statistics.mean(top1),
                    "diverged": sum(result.diverged for result in of_setting),
                }
            )
    return rows


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot accuracy against batch size: the mean of the seeds as a line, each seed as a dot."""
    figure, axes = new_chart("Validation accuracy at the same number of epochs", 6.4, 3.6)
    for method, colour in COLOURS.items():
        of_method = [row for row in rows if row["method"] == method]
        batches = [row["batch"] for row in of_method]
        axes.plot(batches, [row["mean_top1_percent"] for row in of_method], color=colour, lw=1.6, label=method)
        for row in of_method:
            axes.plot(
                [row["batch"]] * len(row["top1_percent"]), row["top1_percent"], "o", color=colour, ms=4, alpha=0.6
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.set_xlabel("clips in a batch", fontsize=9)
    axes.set_ylabel("top-1 [%]", fontsize=9)
    axes.set_ylim(0, 103)
    axes.axhline(CHANCE_PERCENT, color="#b9c0ca", lw=0.9, ls="--")
    add_legend(axes)
    figure.savefig(path)


def parse_arguments() -> argparse.Namespace:
    parser = common.argument_parser("Accuracy against batch size at the same number of epochs.")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time, a thread each")
    parser.add_argument("--outputs", type=Path, default=CHECKOUT / "outputs" / "large_batch", help="folder of the runs")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw accuracy against batch (.svg, .png, .pdf)")
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    batches: Sequence[int] = BATCHES
    seeds: Sequence[int] = SEEDS
    others: Sequence[str] = ()
    if options.quick:
        batches, seeds, others = (8, 32), (0,), ["schedule.epochs=0.1", "schedule.warmup_epochs=0"]
        options.outputs = options.outputs.with_name("large_batch_quick")
    facts = common.machine_facts(threads=1)
    options.outputs.mkdir(parents=True, exist_ok=True)
    root, *sizes = DATA
    subprocess.run([sys.executable, "prepare.py", "shapes", "--root", root, *sizes], cwd=CHECKOUT, check=True)
    # Seed by seed: an interrupted benchmark then covers all methods and batches.
    runs = [Run(method, batch, seed) for seed in seeds for batch in reversed(batches) for method in METHODS]
    rows = rows_of(train_all(runs, options.outputs.resolve(), options.jobs, others))
    print(f"\n{facts['cpu']}, torch {facts['torch']}, {facts['date']}; validation top-1 of {len(seeds)} seeds\n")
    common.print_table(
        ("method", "batch", "steps", "peak rate", "mean [%]", "seeds [%]"),
        [
            [
                row["method"],
                str(row["batch"]),
                str(row["steps"]),
                f"{row['peak_rate']:.4g}",
                f"{row['mean_top1_percent']:.1f}",
                " ".join(f"{value:.1f}" for value in row["top1_percent"])
                + (f" ({row['diverged']} diverged)" if row["diverged"] else ""),
            ]
            for row in rows
        ],
    )
    if options.plot:
        draw(rows, options.plot)
    if options.json:
        common.write_rows(options.json, rows, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
