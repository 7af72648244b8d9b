"""Measure an optimizer step on a network's parameters: LARS against torch's three implementations of SGD and timm's LARS.

python benchmarks/optimizer.py                   ResNet-50 at 400 classes, two threads
python benchmarks/optimizer.py --device cuda
python benchmarks/optimizer.py --quick --json FILE

torch's fused SGD is the lower bound: it reads weight, gradient and velocity once and writes weight and velocity once. LARS must
also read weights and gradients before that, for their norms: 7 passes over memory instead of 5.
"""
# ruff: noqa: E402  (the packages of the checkout can be imported only after sys.path is set below)

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parent.parent)  # the checkout instead of this folder

import torch
from torch import nn

from benchmarks import common
from training.optim.lars import Lars
from tsm.networks import build_network

NUM_CLASSES = 400
TARGETS = "target of LARS: 2 or less of fused SGD, and half of timm's or less"
MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4

Groups = list[dict[str, Any]]


def parameters_of(backbone: str, device: str) -> list[nn.Parameter]:
    """Return parameters with gradients; each optimizer has its own, so that none profits from another's cached data."""
    torch.manual_seed(0)
    parameters = list(build_network(backbone, NUM_CLASSES).to(device).parameters())
    for parameter in parameters:
        parameter.grad = 0.01 * torch.randn_like(parameter)
    return parameters


def groups_of(parameters: list[nn.Parameter]) -> Groups:
    """Return two parameter groups: weights with weight decay, and all others without."""
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]


def sgd(groups: Groups, **form: bool) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.1, momentum=MOMENTUM, **form)  # type: ignore[arg-type]


def lars(groups: Groups) -> torch.optim.Optimizer:
    groups[1]["adapt"] = False
    return Lars(groups, lr=0.1, momentum=MOMENTUM)


def timm_lars(groups: Groups) -> torch.optim.Optimizer:
    # It adapts the rate of the parameters with weight decay, as ours does here.
    from timm.optim import Lars as TimmLars

    return TimmLars(groups, lr=0.1, momentum=MOMENTUM)


CONTESTANTS: dict[str, Callable[[Groups], torch.optim.Optimizer]] = {
    "SGD fused": lambda groups: sgd(groups, fused=True),
    "SGD loop": lambda groups: sgd(groups, foreach=False),
    "SGD foreach": lambda groups: sgd(groups, foreach=True),
    "LARS, timm's": timm_lars,
    "LARS, ours": lars,
}


def take_turns(backbone: str, device: str, rounds: int) -> dict[str, list[float]]:
    """Return seconds per step of each optimizer, one per round."""
    optimizers = {name: make(groups_of(parameters_of(backbone, device))) for name, make in CONTESTANTS.items()}
    names = list(optimizers)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(rounds + 2):
        first = round_number % len(names)
        for name in names[first:] + names[:first]:
            start = common.Clock.now(device)
            optimizers[name].step()
            # The first two rounds fill optimizer state and caches.
            if round_number >= 2:
                seconds[name].append(common.Clock.now(device).since(start, 1).wall_s)
    return seconds


def parse_arguments() -> argparse.Namespace:
    parser = common.argument_parser("The cost of an optimizer's step.")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--rounds", type=int, default=60, help="steps of each optimizer")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    if options.quick:
        options.rounds = 10
    torch.set_num_threads(options.threads)
    facts = common.machine_facts(options.threads)
    seconds = take_turns(options.backbone, options.device, options.rounds)
    rows = [
        {
            "benchmark": "optimizer",
            "optimizer": name,
            "backbone": options.backbone,
            "device": options.device,
            "rounds": options.rounds,
            "step_s": common.median_interval(samples),
            "ratio_to_fused_sgd": common.ratio_interval(samples, seconds["SGD fused"]),
            "ratio_to_timm": common.ratio_interval(samples, seconds["LARS, timm's"]),
        }
        for name, samples in seconds.items()
    ]
    numbers = sum(parameter.numel() for parameter in parameters_of(options.backbone, options.device))
    print(
        f"{options.backbone}, {numbers / 1e6:.1f} M parameters, {options.rounds} steps each, {options.device}"
        f"\n{facts['cpu']}, {facts['cores']} cores, load {facts['load']}; torch {facts['torch']}, "
        f"{options.threads} thread(s); {facts['date']}\nmedian [its 95% interval]; ratios within each round\n"
    )
    titles = ("optimizer", "step [ms]", "to fused SGD", "to timm's LARS")
    columns = ("ratio_to_fused_sgd", "ratio_to_timm")
    common.print_table(
        titles,
        [[row["optimizer"], row["step_s"].show(1000), *(row[name].show(digits=2) for name in columns)] for row in rows],
    )
    print(f"\n{TARGETS}")
    if options.json:
        common.write_rows(options.json, rows, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
