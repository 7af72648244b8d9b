"""Measure how long saving a checkpoint stalls training: a background save against a blocking save.

python benchmarks/checkpoint.py                          ResNet-50 at 400 classes with SGD's momentum
python benchmarks/checkpoint.py --folder /scratch        on another disk
python benchmarks/checkpoint.py --quick --json FILE

Both write the same bytes with the same code to the same disk. They alternate, and each background write ends before the next save
begins. Then steps of a small network are timed during a background write and without one.
"""
# ruff: noqa: E402  (the packages of the checkout can be imported only after sys.path is set below)

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)  # the checkout instead of this folder

import torch
from torch import nn

from benchmarks import common
from distributed.checkpoint.store import Checkpoint, Snapshot, write_snapshot
from distributed.checkpoint.writer import CheckpointWriter, Written
from tsm.networks import build_network

NUM_CLASSES = 400
# Ratio of the background save's stall to a blocking save.
TARGET = 0.20
KEEP = 2


def checkpoint_of(backbone: str, step: int) -> Checkpoint:
    torch.manual_seed(0)
    network = build_network(backbone, NUM_CLASSES)
    momentum = {f"{name}.momentum_buffer": torch.randn_like(weight) for name, weight in network.named_parameters()}
    return Checkpoint(dict(network.state_dict()), momentum, {"step": step})


def take_turns(checkpoint: Checkpoint, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Return seconds per round: the blocking save, the background save's stall, and its write after the stall."""
    writer, snapshot = CheckpointWriter(folder / "behind", KEEP), Snapshot()
    seconds: dict[str, list[float]] = {"waited for": [], "stall": [], "behind": []}
    for round_number in range(rounds + 1):
        checkpoint.state["step"] = round_number
        for behind in (False, True) if round_number % 2 else (True, False):
            if behind:
                written = save_behind(writer, checkpoint)
                taken = {"stall": written.stall_s, "behind": written.duration_s - written.stall_s}
            else:
                start_s = time.perf_counter()
                snapshot.take(checkpoint)
                write_snapshot(folder / "waited", snapshot, KEEP)
                taken = {"waited for": time.perf_counter() - start_s}
            for name, value in taken.items():
                # The first round also allocates memory.
                if round_number:
                    seconds[name].append(value)
    return seconds


def save_behind(writer: CheckpointWriter, checkpoint: Checkpoint) -> Written:
    writer.save(checkpoint)
    writer.wait()
    (written,) = writer.ended()
    if written.failed is not None:
        raise SystemExit(written.failed)
    return written


def steps_in_turns(checkpoint: Checkpoint, folder: Path, rounds: int) -> tuple[list[float], list[float]]:
    """Return seconds per step during a write, and right before it without one; one pair per round."""
    writer = CheckpointWriter(folder / "behind", KEEP)
    network = build_network("resnet18", 10, num_frames=4)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, fused=True)
    video_NTCHW, label_N = torch.randn(2, 4, 3, 56, 56), torch.tensor([0, 1])

    def step_s() -> float:
        start_s = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(video_NTCHW), label_N).backward()
        optimizer.step()
        return time.perf_counter() - start_s

    during: list[float] = []
    before: list[float] = []
    for round_number in range(rounds + 1):
        checkpoint.state["step"] = round_number
        quiet = [step_s() for _ in range(8)]
        writer.save(checkpoint)
        busy = []
        while not writer.ended():
            busy.append(step_s())
        if round_number:
            during.append(sum(busy) / len(busy))
            before.append(sum(quiet) / len(quiet))
    return during, before


def parse_arguments() -> argparse.Namespace:
    parser = common.argument_parser("The cost of a checkpoint.")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--rounds", type=int, default=20, help="saves of each kind")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument(
        "--folder", type=Path, help="on the disk that is meant; the system's for temporary files otherwise"
    )
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    if options.quick:
        options.rounds = 3
    torch.set_num_threads(options.threads)
    facts = common.machine_facts(options.threads)
    checkpoint = checkpoint_of(options.backbone, 0)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        for kind in ("behind", "waited"):
            (folder / kind).mkdir()
        seconds = take_turns(checkpoint, folder, options.rounds)
        during, before = steps_in_turns(checkpoint, folder, options.rounds)
    size_mb = (
        sum(tensor.nbytes for part in (checkpoint.network, checkpoint.optimizer) for tensor in part.values()) / 1e6
    )
    row = {
        "benchmark": "checkpoint",
        "backbone": options.backbone,
        "size_mb": round(size_mb, 1),
        "rounds": options.rounds,
        "waited_for_s": common.median_interval(seconds["waited for"]),
        "stall_s": common.median_interval(seconds["stall"]),
        "behind_s": common.median_interval(seconds["behind"]),
        "stall_ratio": common.ratio_interval(seconds["stall"], seconds["waited for"]),
        "step_ratio": common.ratio_interval(during, before),
    }
    print(
        f"{options.backbone} with momentum, {size_mb:.0f} MB, {options.rounds} rounds"
        f"\n{facts['cpu']}, {facts['cores']} cores, load {facts['load']}; torch {facts['torch']}, "
        f"{options.threads} thread(s); {facts['date']}\nmedian [its 95% interval]; ratios within each round\n"
    )
    rows = [
        ["save that is waited for [ms]", row["waited_for_s"].show(1000)],
        ["stall of one that is written behind [ms]", row["stall_s"].show(1000)],
        ["its write behind the stall [ms]", row["behind_s"].show(1000)],
        ["stall / save that is waited for", row["stall_ratio"].show(digits=3)],
        ["a step while a write is under way / without", row["step_ratio"].show(digits=3)],
    ]
    common.print_table(("", "median"), rows)
    print(f"\ntarget of the stall: {TARGET:.2f} or less of a save that is waited for")
    if options.json:
        common.write_rows(options.json, [row], facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
