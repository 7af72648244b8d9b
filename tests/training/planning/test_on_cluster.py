"""plan.py cluster=NAME: time with its interval, memory and step times against the device, sweeps, and what is missing."""

import json
import re
from pathlib import Path

import pytest

from tests.training.config.test_config import compose, config_of
from training.build.model import network_of
from training.build.recipe import recipe_of
from training.planning.command import run_plan
from training.planning.estimates import estimate_network
from training.planning.on_cluster import cluster_of
from training.planning.simulator.run import Simulation, simulate
from training.planning.simulator.step import Layout
from training.planning.workload import gradients_of, on_device, precision_of, workload_of

SUMMIT = ("experiment=kinetics_1536", "cluster=summit", "model.init=random", "data.root=/nowhere")


def planned(capsys: pytest.CaptureFixture[str], *overrides: str) -> tuple[int, str, str]:
    """`(exit code, the plan, its errors)`."""
    code = run_plan(lambda: compose(*overrides))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_published_run_on_its_cluster(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """arXiv:1910.00932: 14 min 13 s. The same command gives text, JSON and the page of a sweep."""
    file, page = tmp_path / "plan.json", tmp_path / "sweep.html"
    worlds = "plan.sweep=[8,96,1000,1536,100000]"
    code, text, errors = planned(
        capsys, *SUMMIT, worlds, f"plan.json={file}", f"plan.html={page}", "cluster.price_per_gpu_h=2"
    )
    assert (code, errors) == (0, "")
    fields = json.loads(file.read_text())
    time = fields["time_to_train_s"]
    assert time["low"] <= 853 <= time["high"] and time["high"] / time["low"] <= 1.35
    assert time["centre"] == pytest.approx(853, rel=0.10)
    assert all(term["source"] and term["sure"] for term in fields["terms"].values())
    assert sum(term["seconds"] for term in fields["terms"].values()) == pytest.approx(time["centre"])
    assert fields["cost"] == pytest.approx(2 * fields["gpu_hours"])
    assert {"8", "96", "1536"} <= set(re.findall(r"^sweep +([\d,]+) ", text.replace(",", ""), re.MULTILINE))
    assert [point["world_size"] for point in fields["sweep"]] == [8, 96, 1_000, 1_536, 100_000]
    assert "does not divide over 1000 processes" in fields["sweep"][2]["problem"]
    assert "summit has 4608 x 6 accelerators" in fields["sweep"][4]["problem"]
    assert "256 x 6" in text and re.search(r"^worlds     nodes x GPUs of summit .* 256 x 6", text, re.MULTILINE)
    assert re.search(
        r"^missing    train.arrow and val.arrow in /nowhere \(python prepare.py kinetics", text, re.MULTILINE
    )
    assert re.search(r"^change     AMP in float16 \(numerics=gpu_fp16\)", text, re.MULTILINE)
    html = page.read_text()
    assert html.count("<svg") == 3 and "256 x 6" in html and "olcf-user-docs" in html
    assert not re.search(r'(src|href)="http', html)


def test_a_larger_network_takes_longer_and_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, errors = planned(capsys, *SUMMIT, "model=tsm_resnet101", "model.num_frames=16")
    assert code == 2
    assert "GiB for its tensors, and V100-SXM2-16GB has 16 GiB. Fix: batch.micro_batch=" in errors
    (step_ms,) = re.findall(r"([\d,.]+) ms per step", text)
    assert float(step_ms) > 3 * 394
    fix = re.findall(r"Fix: (batch.micro_batch=\d+)", errors)[0]
    assert planned(capsys, *SUMMIT, "model=tsm_resnet101", "model.num_frames=16", fix)[0] == 0, "the fix helps"


def test_a_step_time_beyond_the_peak_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    small = (*SUMMIT, "distributed.world_size=96")
    code, _, errors = planned(capsys, *small, "plan.step_s=0.5")
    assert code == 2
    assert "plan.step_s=0.5 on 96 processes needs 50.2 TFLOP/s each, 3.2 times the peak of V100-SXM2-16GB" in errors
    code, text, _ = planned(capsys, *small, f"plan.step_s={re.findall(r'Fix: plan.step_s=([0-9.]+)', errors)[0]}")
    assert code == 0 and "no experience factor" in text


def simulated(*overrides: str) -> Simulation:
    config = config_of(*SUMMIT, *overrides)
    cluster = cluster_of(config)
    assert cluster is not None
    recipe = recipe_of(config, 239_781, "")
    network = estimate_network(config.model, 400, 224, 4)
    workload = on_device(
        workload_of(config, recipe, network.clip_multiply_adds, 195_000_000, None, None), set(cluster.achieved_tflop_s)
    )
    return simulate(cluster, workload, Layout(1_536, 8), config.plan.experience)


def test_without_experience_steps_take_what_was_measured_on_a_node() -> None:
    run = simulated("plan.experience=1")
    steps_s = sum(run.terms[name].seconds for name in (*run.step.parts, "experience", "input"))
    assert 700 <= steps_s <= 735


def test_the_tensors_of_backward_have_all_multiply_adds() -> None:
    import torch

    model = config_of("experiment=kinetics_1536").model
    with torch.device("meta"):
        network = network_of(model, 400)
        video_NTCHW = torch.empty(1, 8, 3, 224, 224)
    gradients = gradients_of(network, lambda: network(video_NTCHW), 4)
    estimate = estimate_network(model, 400, 224, 4)
    assert len(gradients) == 161
    assert sum(gradient.num_bytes for gradient in gradients) == estimate.gradient_bytes
    assert sum(gradient.multiply_adds for gradient in gradients) == estimate.clip_multiply_adds
    # The classifier's bias and weight come first, the first convolution last.
    assert [gradients[place].num_bytes for place in (0, 1, -1)] == [4 * 400, 4 * 400 * 2_048, 4 * 64 * 3 * 49]


def test_precision_is_that_of_the_configuration() -> None:
    chosen = {
        "numerics=reference": "tf32", "numerics.tf32=false": "float32", "numerics=gpu": "bfloat16",
        "numerics=gpu_fp16": "float16", "numerics.dtype=float64": "float64",
    }  # fmt: skip
    for override, precision in chosen.items():
        assert precision_of(config_of("experiment=kinetics_1536", override).numerics) == precision
