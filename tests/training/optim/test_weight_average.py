"""EMA of weights: computed by hand, unaffected by skipped steps, and saved in the checkpoints of a real run."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.helpers.entry_points import Called, entry_points
from tests.helpers.jobs import make_clips
from training.optim.ema import EMA

GOOD, BAD = torch.tensor(0.0), torch.tensor(1.0)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2).double()


def test_the_average_by_hand_leaves_bad_steps_out() -> None:
    network = linear()
    average = EMA(network, 0.9)
    expected = network.weight.detach().clone()
    for step in range(5):
        bad = BAD if step == 2 else GOOD
        with torch.no_grad():
            network.weight += step + 1
        average.update(bad)
        if step != 2:
            expected = 0.9 * expected + 0.1 * network.weight.detach()
    torch.testing.assert_close(average.tensors()["average.weight"], expected, rtol=1e-14, atol=0)


def test_the_weights_come_back_bit_for_bit_also_after_an_error() -> None:
    network = linear()
    average = EMA(network, 0.5)
    first = network.weight.detach().clone()
    with torch.no_grad():
        network.weight.mul_(1 / 3)
    kept = network.weight.detach().clone()
    with pytest.raises(ZeroDivisionError), average.in_place_of_weights():
        1 / (0 if torch.equal(network.weight, first) else 1)
    assert torch.equal(network.weight, kept)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_a_decay_that_averages_nothing_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=r"\(0, 1\)"):
        EMA(linear(), decay)


@pytest.mark.slow
def test_a_run_evaluates_its_average_and_goes_on_with_it(tmp_path: Path) -> None:
    """A run resumed after one step has the EMA of an uninterrupted run, and evaluate.py uses it too."""
    make_clips(tmp_path / "clips")
    options = (
        "experiment=smoke logger=disabled pipeline.decoder=pyav pipeline.workers=0 model.num_frames=2 "
        "batch.global_batch=16 schedule.epochs=1 schedule.warmup_epochs=0 numerics.deterministic=true "
        f"optimizer.ema_decay=0.7 data.root={tmp_path / 'clips'} outputs={tmp_path}"
    )

    def run(program: str, overrides: str) -> Called:
        called = entry_points()(f"{program} {options} {overrides}")
        assert called.exit_code == 0, called.output
        return called

    run("train.py", "run_id=straight")
    run("train.py", "run_id=stopped max_steps=1")
    run("train.py", "run_id=stopped")
    step = "checkpoints/step-00000002"
    straight, stopped = (
        load_file(tmp_path / name / step / "optimizer.safetensors") for name in ("straight", "stopped")
    )
    averages = [name for name in straight if name.startswith("average.")]
    assert averages
    for name in averages:
        assert torch.equal(straight[name], stopped[name])
    weights = load_file(tmp_path / "straight" / step / "network.safetensors")
    assert not torch.equal(weights["classifier.weight"], straight["average.classifier.weight"])

    lines = map(json.loads, (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines())
    (trained,) = [record for record in lines if record["kind"] == "evaluation"]
    evaluated = json.loads(run("evaluate.py", "run_id=straight").last_line)
    assert evaluated["loss"] == pytest.approx(trained["loss"], rel=1e-5)
