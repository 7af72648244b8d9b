"""The simulator: rules of DDP and NCCL, the step model, its interval, and the sources of every cluster's figures."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from runtime.checkout import CHECKOUT
from training.errors import ConfigError
from training.planning.simulator.all_reduce import all_reduce_of, nccl_s, table_s
from training.planning.simulator.figures import NUMBERS, Cluster, Table, read_cluster
from training.planning.simulator.overlap import (
    Gradient,
    Message,
    ddp_messages,
    exposed_s,
    horovod_messages,
    ready_times,
)
from training.planning.simulator.run import simulate
from training.planning.simulator.step import Layout, Workload, expected_slowest_s, model_step
from training.planning.simulator.sweep import best_changes

CLUSTERS = sorted(path.stem for path in (CHECKOUT / "conf/cluster").glob("*.yaml"))
MIB = 2**20
# 161 tensors, 24.3 M values, 32.7 G multiply-adds: about TSM's ResNet-50.
GRADIENTS = tuple(Gradient(604_000, 203_000_000) for _ in range(161))
PUBLISHED = Workload(
    32_703_643_648, GRADIENTS, "float32", 12_288, 1_951, evaluations=2, evaluation_clips=19_877, checkpoints=10,
    checkpoint_bytes=195_000_000,
)  # fmt: skip


def described(name: str = "summit") -> dict[str, Any]:
    figures: dict[str, Any] = yaml.safe_load((CHECKOUT / f"conf/cluster/{name}.yaml").read_text())["figures"]
    return figures


def cluster(name: str = "summit", **values: Any) -> Cluster:
    figures = deepcopy(described(name))
    for key, value in values.items():
        figures[key]["value"] = value
    return read_cluster(name, figures)


# --- Figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_figure_of_a_cluster_has_a_source(name: str) -> None:
    figures = read_cluster(name, described(name)).figures
    assert set(NUMBERS) <= set(figures)
    assert all(figure.source.strip() and figure.sure for figure in figures.values())
    # From memory is never called published.
    assert not [key for key, figure in figures.items() if "memory" in figure.source and figure.sure == "published"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"c0_s": {"value": 0.012, "sure": "guess"}}, "c0_s must have value, source and sure"),
        ({"c0_s": {"value": 0.012, "source": " ", "sure": "guess"}}, "c0_s has no source"),
        ({"c0_s": {"value": 0.012, "source": "a", "sure": "certain"}}, "sure of c0_s must be one of published"),
        ({"c0_s": {"value": -1, "source": "a", "sure": "guess"}}, "c0_s must be a number above 0, got -1"),
        ({"network_gb_s": {"value": "fast", "source": "a", "sure": "guess"}}, "network_gb_s must be a number"),
        ({"c1_s": {"value": 1, "source": "a", "sure": "guess"}}, "unknown figures c1_s"),
        ({"startup_s": {"value": [3, 2, 1], "source": "a", "sure": "guess"}}, "least, central, most"),
        ({"peak_tflop_s": {"int8": {"value": 1, "source": "a", "sure": "guess"}}}, "peak_tflop_s must have figures by"),
        (
            {"peak_tflop_s": {"float32": {"value": 1, "source": "", "sure": "guess"}}},
            "peak_tflop_s.float32 has no source",
        ),
        ({"node_link": {"value": "rope", "source": "a", "sure": "guess"}}, "node_link must be nvlink or pcie"),
    ],
)
def test_a_figure_without_source_or_sense_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        read_cluster("summit", described() | change)
    assert "Fix: " in str(refused.value)


def test_a_missing_figure_is_named() -> None:
    figures = described()
    del figures["jitter_s"]
    with pytest.raises(ConfigError, match="lacks jitter_s"):
        read_cluster("summit", figures)


# --- All-reduce -------------------------------------------------------------------------------------------------------


def test_nccl_takes_the_latency_of_a_tree_and_the_bandwidth_of_the_network() -> None:
    summit = cluster()
    small = [all_reduce_of(summit, ranks)(8) for ranks in (6, 12, 96, 1_536)]
    assert small == sorted(small) and small[-1] < 2 * small[2], "small messages grow with the logarithm"
    assert all_reduce_of(summit, 1)(MIB) == 0
    for ranks in (96, 1_536):
        huge_s = all_reduce_of(summit, ranks)(1e9)
        # A ring sends almost twice the bytes.
        assert 2e9 / 23e9 * 0.95 < huge_s < 2e9 / 23e9 * 1.6
    # Two nodes of 4, LL: a ring of 12 hops within nodes and 2 between them. On 128 nodes of 4, a tree of 3 and 7 hops, twice.
    assert nccl_s(8, 8, 2, "nvlink", 100, 20) == pytest.approx((3.6 + 12 * 0.47 * 1.8 + 2 * 2.7) * 1e-6, rel=0.01)
    assert nccl_s(8, 512, 128, "nvlink", 100, 20) == pytest.approx(
        (4.4 + 2 * (3 * 0.52 * 1.8 + 7 * 5)) * 1e-6, rel=0.01
    )


def test_a_measured_table_is_kept_and_scaled_as_a_ring() -> None:
    table = Table(2, "ring", (1e5, 1e6, 1e7), (2e-3, 11e-3, 93e-3))
    assert [table_s(table, size, 2) for size in table.bytes_P] == pytest.approx([2e-3, 11e-3, 93e-3])
    assert table_s(table, 2e7, 2) == pytest.approx(186e-3)
    assert 11e-3 < table_s(table, 3e6, 2) < 93e-3
    # The first two sizes are on a line, which leaves 1 ms for no bytes.
    assert table_s(table, 64, 2) == pytest.approx(1e-3, rel=0.01)
    # Three times the hops; 1.5 times the bytes sent.
    assert table_s(table, 1e6, 4) == pytest.approx(3e-3 + 1.5 * 10e-3)
    tree = replace(table, growth="tree")
    assert table_s(tree, 1e6, 4) == pytest.approx(2e-3 + 1.5 * 10e-3)
    assert table_s(table, 1e6, 1) == 0


# --- Overlap ----------------------------------------------------------------------------------------------------------


def test_buckets_are_those_of_torch() -> None:
    random = np.random.default_rng(1)
    sizes = [int(size) for size in 10 ** random.uniform(2, 6.8, 120)]
    gradients = [Gradient(4 * size, size) for size in sizes]
    messages = ddp_messages(gradients, ready_times(gradients, 1.0))
    tensors = [torch.empty(size, device="meta") for size in sizes]
    buckets, _ = torch._C._distributed_c10d._compute_bucket_assignment_by_size(tensors, [MIB, 25 * MIB])
    assert [message.num_bytes for message in messages] == [
        4 * sum(sizes[place] for place in bucket) for bucket in buckets
    ]
    halved = [Gradient(2 * size, size) for size in sizes]
    sent = ddp_messages(halved, ready_times(halved, 1.0), fp32_ratio=2.0)
    assert [2 * message.num_bytes for message in sent] == [message.num_bytes for message in messages]


def test_horovod_fuses_by_cycles_and_threshold() -> None:
    gradients = [Gradient(10, 1)] * 6
    ready = [0.0001, 0.0009, 0.0011, 0.0019, 0.002, 0.0041]
    messages = horovod_messages(gradients, ready, 1e-3, 100)
    assert [message.ready_s for message in messages] == pytest.approx([0.001, 0.002, 0.005])
    assert [message.num_bytes for message in messages] == [20, 30, 10]
    assert [message.num_bytes for message in horovod_messages(gradients, ready, 1e-3, 20)] == [20, 20, 10, 10]


def test_only_what_outlasts_backward_is_exposed() -> None:
    messages = [Message(1.0, 10), Message(2.0, 10), Message(3.0, 10)]
    assert exposed_s(messages, 3.0, lambda size: 0.5) == pytest.approx(0.5)
    # The network is busy until the end: 1 + 3 x 2 - 3.
    assert exposed_s(messages, 3.0, lambda size: 2.0) == pytest.approx(4.0)
    assert exposed_s([Message(0.5, 10)], 3.0, lambda size: 1.0) == 0
    assert exposed_s(messages, 3.0, lambda size: 0.5, negotiation_s=0.25) == pytest.approx(0.75)


def test_gradients_are_ready_as_their_layers_compute() -> None:
    gradients = [Gradient(1, 30), Gradient(1, 0), Gradient(1, 70)]
    assert ready_times(gradients, 2.0) == pytest.approx([0.6, 0.6, 2.0])


# --- The step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 8, 1_536])
def test_the_slowest_of_many_ranks(ranks: int) -> None:
    slowest = np.random.default_rng(0).exponential(1.0, (2_000, ranks)).max(axis=1).mean()
    assert expected_slowest_s(1.0, ranks) == pytest.approx(slowest, rel=0.05)


def test_compute_grows_with_clips_networks_and_precision() -> None:
    summit, layout = cluster(), Layout(1_536, 8)
    parts = model_step(summit, PUBLISHED, layout).parts
    assert parts["clips"].seconds + parts["c0"].seconds == pytest.approx(0.360, rel=0.005)
    assert parts["c0"].seconds == pytest.approx(0.012)
    half = model_step(summit, replace(PUBLISHED, precision="float16"), layout).parts
    assert parts["clips"].seconds / half["clips"].seconds == pytest.approx(1_200 / 367, rel=0.01)
    two = model_step(summit, PUBLISHED, Layout(768, 8, accumulation=2)).parts
    assert two["clips"].seconds == pytest.approx(2 * parts["clips"].seconds)
    with pytest.raises(ConfigError, match="no figure for bfloat16 on V100.*Fix: numerics=gpu_fp16"):
        model_step(summit, replace(PUBLISHED, precision="bfloat16"), layout)


def test_batch_norm_over_ranks_waits_for_each_message() -> None:
    workload = replace(PUBLISHED, bn_messages=106, bn_message_bytes=640_000)
    local, over = (model_step(cluster(), workload, Layout(1_536, 8, bn_ranks=ranks)).parts for ranks in (1, 2))
    assert local["batch norm"].seconds == 0
    assert over["batch norm"].seconds == pytest.approx(106 * all_reduce_of(cluster(), 2)(640_000 / 106))
    slow = model_step(cluster(), replace(workload, backend="horovod"), Layout(1_536, 8, bn_ranks=2)).parts
    assert slow["batch norm"].seconds - over["batch norm"].seconds == pytest.approx(0.106)


def test_input_limits_a_step_only_when_it_is_slower() -> None:
    raw = replace(PUBLISHED, prepared=False)
    few_cores = cluster(cores_per_node=2)
    assert model_step(few_cores, raw, Layout(1_536, 8)).input_s == pytest.approx(48 * 0.0505 / 2)
    stalled = simulate(few_cores, raw, Layout(1_536, 8))
    assert stalled.step_s.centre == pytest.approx(1.212) and stalled.limit == "input"
    assert simulate(cluster(), raw, Layout(1_536, 8)).terms["input"].seconds == 0
    slow_disk = cluster(read_gb_s=0.001)
    found = model_step(slow_disk, replace(PUBLISHED, stored_clip_bytes=215e3), Layout(1_536, 8))
    assert (found.input_limit, found.input_s) == ("reading", pytest.approx(48 * 215e3 / 1e6))


# --- The run ----------------------------------------------------------------------------------------------------------


def test_the_published_run_lies_in_the_interval() -> None:
    """14 min 13 s on 1,536 V100 (arXiv:1910.00932)."""
    found = simulate(cluster(), PUBLISHED, Layout(1_536, 8))
    time = found.time_to_train_s
    assert time.low <= 853 <= time.high
    assert time.high / time.low <= 1.35
    assert time.centre == pytest.approx(853, rel=0.10)
    assert sum(part.seconds for part in found.terms.values()) == pytest.approx(time.centre)
    assert all(part.source and part.sure for part in found.terms.values())
    assert simulate(cluster(), PUBLISHED, Layout(1_536, 8)) == found, "the seed is fixed"


def test_without_experience_steps_take_what_the_parts_do() -> None:
    found = simulate(cluster(), PUBLISHED, Layout(1_536, 8), experience=1)
    steps_s = sum(found.terms[name].seconds for name in (*found.step.parts, "experience", "input"))
    assert 700 <= steps_s <= 735
    assert found.terms["experience"].seconds == 0


def test_a_measured_step_time_replaces_the_model() -> None:
    found = simulate(cluster(), PUBLISHED, Layout(1_536, 8), step_s=0.5)
    assert found.step_s.low == found.step_s.centre == found.step_s.high == 0.5
    assert found.terms["clips"].seconds == pytest.approx(1_951 * 0.5)


def test_hours_energy_and_cost_follow_from_the_time() -> None:
    found = simulate(cluster(), PUBLISHED, Layout(1_536, 8), price_per_gpu_h=2.0)
    hours = found.time_to_train_s.centre / 3600
    assert found.gpu_hours == pytest.approx(1_536 * hours)
    assert found.energy_kwh == pytest.approx(256 * 2.2 * hours)
    assert found.cost == pytest.approx(2 * found.gpu_hours)
    assert simulate(cluster(), PUBLISHED, Layout(1_536, 8)).cost is None


def test_a_slow_host_is_a_floor_of_small_micro_batches() -> None:
    device, slow = cluster(), cluster(host_s=0.5)
    for clips, expected_s in ((1, 0.5), (8, 0.5), (64, None)):
        parts = model_step(slow, PUBLISHED, Layout(6, clips)).parts
        without = model_step(device, PUBLISHED, Layout(6, clips)).parts
        compute_s = parts["clips"].seconds + parts["c0"].seconds
        assert parts["clips"] == without["clips"]
        assert compute_s == pytest.approx(expected_s or without["clips"].seconds + without["c0"].seconds)
    assert "H200" in model_step(slow, PUBLISHED, Layout(6, 8)).parts["c0"].source


def test_the_changes_that_help_most() -> None:
    summit, workload, layout = cluster(cores_per_node=2), replace(PUBLISHED, prepared=False), Layout(1_536, 8)
    found = simulate(summit, workload, layout)
    fewer = [Layout(768, 8, 2), Layout(384, 8, 4)]
    changes = best_changes(summit, workload, found, fewer, lambda *changed: simulate(summit, *changed))
    assert changes[0].what == "prepared data" and changes[0].time_saved > 0.5
    assert len(changes) <= 3
    found = simulate(cluster(), PUBLISHED, layout)
    changes = best_changes(cluster(), PUBLISHED, found, fewer, lambda *changed: simulate(cluster(), *changed))
    assert [change.what.split(":")[0] for change in changes[:2]] == ["AMP in float16", "fewer ranks"]
    assert changes[1].how == "distributed.world_size=768" and changes[1].time_saved < 0
    h100, half = cluster("dgx_h100"), replace(PUBLISHED, precision="bfloat16")
    small = simulate(h100, half, Layout(192, 8, 8))
    changes = best_changes(h100, half, small, [Layout(192, 64)], lambda *changed: simulate(h100, *changed))
    assert changes[0].how == "batch.micro_batch=64" and changes[0].time_saved > 0.1
