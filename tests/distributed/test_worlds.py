"""Distributed behaviour in real worlds of 1, 2 and 4 processes on every backend."""

import json
import math
import re
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipelines.loading.clips import ClipSource, TrainingClips
from pipelines.stream.augmentation import dropout_seeds
from tests.helpers.jobs import make_clips
from tests.helpers.processes import LISTENING
from tests.helpers.worlds import WORLDS, Results, World, available, launch
from tests.world_cases.bodies import (
    CHECKOUT,
    EQUIVALENCE,
    SLOWED_S,
    SLOWED_VARIANT,
    VARIANTS,
    compose_config,
    narrowed,
)
from training.build.data import augmentation_of
from training.build.recipe import recipe_of
from training.config.load import register
from training.optim.gradient_diagnostics import noise_and_signal
from training.telemetry.records import read_metrics
from training.telemetry.step_clock import PHASES
from tsm.networks import build_network

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def launches(tmp_path_factory: pytest.TempPathFactory) -> dict[World, Any]:
    """Cache of results by world, filled on demand; the folder holds the clips that all worlds train on."""
    folder = tmp_path_factory.mktemp("worlds")
    make_clips(folder / "clips")
    return {"folder": folder}  # type: ignore[dict-item]


@pytest.fixture(params=WORLDS, ids=lambda world: world.name)
def world(request: pytest.FixtureRequest) -> World:
    return available(request.param)


def results_of(world: World, launches: dict[Any, Any]) -> Results:
    if world not in launches:
        try:
            launches[world] = launch(world, launches["folder"] / world.name)
        except AssertionError as error:
            launches[world] = error
    found = launches[world]
    if isinstance(found, AssertionError):
        raise found
    return found


@pytest.fixture
def results(world: World, launches: dict[Any, Any]) -> Results:
    return results_of(world, launches)


def final_weights(results: Results, run_id: str) -> dict[str, Tensor]:
    newest = max((results.folder / run_id / "checkpoints").iterdir())
    return load_file(newest / "network.safetensors")


def largest_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Largest difference over all tensors, relative to the largest value of the tensor."""
    assert left.keys() == right.keys()
    return max(
        ((left[name] - right[name]).abs().max() / right[name].abs().max().clamp_min(1e-12)).item()
        for name in left
        if left[name].is_floating_point()
    )


@pytest.fixture(scope="session")
def reference_weights(launches: dict[Any, Any]) -> dict[str, Tensor]:
    return bare_loop(launches["folder"] / "clips")


def bare_loop(clips: Path) -> dict[str, Tensor]:
    """The `whole_world` run in plain torch: one process, one batch, torch's batch norm and SGD."""
    register()
    config = compose_config(*EQUIVALENCE, *VARIANTS["whole_world"], f"data.root={clips}")
    dataset = TrainingClips(
        ClipSource(clips / "train.arrow", "pyav"),
        augmentation_of(config.model, config.data, config.pipeline),
        config.seed,
    )
    recipe = recipe_of(config, len(dataset.source.manifest), "")
    torch.manual_seed(config.seed)
    network = build_network("resnet18", 10, num_frames=config.model.num_frames).double()
    decayed = [p for p in network.parameters() if p.dim() > 1]
    others = [p for p in network.parameters() if p.dim() == 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.optimizer.weight_decay},
        {"params": others},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    for step in range(20):
        slot_N = torch.arange(8).numpy()
        batch = dataset[step * 8 + slot_N]
        network.dropout.seed_N = torch.from_numpy(dropout_seeds(config.seed, step, slot_N))
        loss = torch.nn.functional.cross_entropy(network(normalised(batch.video_NTCHW)), batch.label_N)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = recipe.schedule.learning_rate(step)
        optimizer.step()
    return network.state_dict()


def normalised(video_NTCHW: Tensor) -> Tensor:
    mean_C = torch.tensor([123.675, 116.28, 103.53], dtype=torch.float64).view(3, 1, 1)
    std_C = torch.tensor([58.395, 57.12, 57.375], dtype=torch.float64).view(3, 1, 1)
    return (video_NTCHW - mean_C) / std_C


def test_one_process_trains_as_plain_torch_does(launches: dict[Any, Any], reference_weights: dict[str, Tensor]) -> None:
    weights = final_weights(results_of(WORLDS[0], launches), "whole_world")
    assert (
        largest_difference(
            {k: v for k, v in weights.items() if "tracked" not in k},
            {k: v for k, v in reference_weights.items() if "tracked" not in k},
        )
        < 1e-9
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_after_20_steps_do_not_depend_on_the_world(
    variant: str, results: Results, launches: dict[Any, Any]
) -> None:
    results.of("equivalence")
    one_process = results_of(WORLDS[0], launches)
    assert largest_difference(final_weights(results, variant), final_weights(one_process, variant)) < 1e-9


def test_the_phases_of_a_step_are_the_whole_step(results: Results) -> None:
    results.of("equivalence")
    for variant in VARIANTS:
        for record in training_records(results, variant):
            phases_s = sum(record[f"{phase}_s"] for phase in PHASES)
            assert phases_s == pytest.approx(record["step_s"], rel=0.05), (variant, record)


def test_the_rank_that_is_slower_is_the_worst_rank(results: Results, world: World) -> None:
    """Most records name it: in one of them another program may have had the cores."""
    results.of("equivalence")
    records = training_records(results, SLOWED_VARIANT)
    assert statistics.mode(record["worst_rank"] for record in records) == world.size - 1
    for record in records:
        assert record["busy_p50_s"] <= record["busy_p90_s"] <= record["busy_max_s"]
        assert record["busy_max_s"] > SLOWED_S


def training_records(results: Results, run_id: str) -> list[dict[str, Any]]:
    return [record for record in read_metrics(results.folder / run_id / "metrics.jsonl") if record["kind"] == "train"]


def test_groupings_differ_from_each_other(launches: dict[Any, Any]) -> None:
    """The equality above can tell right groups from wrong ones."""
    results = results_of(WORLDS[0], launches)
    results.of("equivalence")
    for name in ("groups_of_4", "groups_of_2_accumulated"):
        assert largest_difference(final_weights(results, name), final_weights(results, f"{name}_whole")) > 1e-3


def test_scores_do_not_depend_on_the_world(results: Results, launches: dict[Any, Any]) -> None:
    expected = results_of(WORLDS[0], launches).of("equivalence")[0]
    for scores in results.of("equivalence"):
        for variant, values in scores.items():
            assert values == pytest.approx(expected[variant], rel=1e-7), variant
            assert values["clips"] == 20


def test_a_stopped_run_goes_on_as_if_it_had_not(results: Results) -> None:
    assert all(results.of("resumed"))
    assert largest_difference(final_weights(results, "resumed"), final_weights(results, "groups_of_4")) < 1e-9


def test_all_ranks_save_when_the_clock_of_rank_0_says_so(results: Results) -> None:
    """Checkpoint by the clock at step 15, which no epoch requires. Ranks that disagreed would hang in different collectives."""
    results.of("resumed")
    saved = [
        record["step"]
        for record in read_metrics(results.folder / "resumed" / "metrics.jsonl")
        if record["kind"] == "checkpoint"
    ]
    assert saved == [15, 20]


def test_deterministic_mode_repeats_and_resumes_bit_for_bit(results: Results) -> None:
    assert results.of("deterministic") == [[]] * len(results.by_rank)


def test_collectives(results: Results, world: World) -> None:
    size = world.size
    for rank, result in enumerate(results.of("collectives")):
        assert result["sum"] == [size * (size + 1) / 2] * 3
        assert result["broadcast"] == [5.0, 5.0]
        ranks, total = result["group"]
        assert rank in ranks and len(ranks) == max(1, size // 2)
        assert total == sum(member + 1 for member in ranks)
        assert result["object"] == {"from": 0, "loss": [0.1, math.inf]}
        # A tuple is no JSON value. A pickle would take it.
        assert result["refused"] == f"JSON does not hold ({rank},) as it is"
        assert result["objects"] == [[other, "x" * other] for other in range(size)]
        assert result["in_inference_mode"] == list(range(size))


def test_a_continuous_stream_does_not_depend_on_the_world(results: Results, launches: dict[Any, Any]) -> None:
    """Each rank shows its part of the clips, after as many frames of those before it as the network remembers."""
    (alone,) = results_of(WORLDS[0], launches).of("continuous_stream")
    assert results.of("continuous_stream") == [alone] * len(results.by_rank)
    predicted_NDPR, seen_N, missing = alone
    assert all(seen_N) and missing == 0
    # Random weights, but not one answer for all.
    assert len({clip[0][9][0] for clip in predicted_NDPR}) > 1


def test_a_job_listens_where_docs_say(results: Results, world: World) -> None:
    found = {(kind, address) for kind, address in results.of("listening_sockets")[0]}
    assert found == LISTENING[world.launcher]


def test_running_statistics_follow_all_groups_of_a_step(results: Results) -> None:
    x_NCHW = torch.randn(16, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    groups = x_NCHW.chunk(8)
    mean_C = torch.stack([group.mean((0, 2, 3)) for group in groups]).mean(0)
    var_C = torch.stack([group.var((0, 2, 3)) for group in groups]).mean(0)
    expected = [*(0.1 * mean_C).tolist(), *(0.9 + 0.1 * var_C).tolist()]
    for values in results.of("running_statistics"):
        assert values == pytest.approx(expected, rel=1e-12)


def test_batch_norm_over_ranks_is_that_of_the_joined_group(results: Results) -> None:
    """Groups of the whole world and of halves, uneven parts, every layout."""
    for differences in results.of("batch_norm_over_ranks"):
        assert max(differences.values()) < 1e-9, differences


def test_precise_batch_norm_averages_over_groups_of_the_next_steps(launches: dict[Any, Any]) -> None:
    """`groups_of_4` ends with precise batch norm over two steps; a test above shows that all worlds agree."""
    weights = final_weights(results_of(WORLDS[0], launches), "groups_of_4")
    network = narrowed(build_network("resnet18", 10, num_frames=4)).double()
    network.load_state_dict(weights)
    network.dropout.eval()
    moments: dict[str, list[Tensor]] = {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            seen = moments.setdefault(name, [])
            module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(moments_of(args[0])))
    register()
    config = compose_config(*EQUIVALENCE, f"data.root={launches['folder'] / 'clips'}")
    source = ClipSource(launches["folder"] / "clips" / "train.arrow", "pyav")
    dataset = TrainingClips(source, augmentation_of(config.model, config.data, config.pipeline), config.seed)
    with torch.no_grad():
        for position_N in (20 * 8 + torch.arange(16)).view(4, 4).numpy():
            network(normalised(dataset[position_N].video_NTCHW))
    assert len(moments) == 20
    for name, seen in moments.items():
        mean_C, square_C = torch.stack(seen).mean(0)
        assert (
            largest_difference(
                {"mean": weights[f"{name}.running_mean"], "var": weights[f"{name}.running_var"]},
                {"mean": mean_C, "var": square_C - mean_C.square()},
            )
            < 1e-9
        ), name


def moments_of(x_BCHW: Tensor) -> Tensor:
    """Mean and second moment of each channel, (2, C)."""
    return torch.stack([x_BCHW.mean((0, 2, 3)), x_BCHW.square().mean((0, 2, 3))])


def test_a_rank_with_another_configuration_is_named(results: Results, world: World) -> None:
    for message in results.of("disagreement"):
        if world.size == 1:
            assert message == ""
        else:
            odd = [0, 1] if world.size == 2 else [world.size - 1]
            named = [int(rank) for rank in re.findall(r"\d+", message.split("of")[0])]
            assert "seed" in message and "99" in message and set(named) <= set(odd), message


def test_the_first_reason_to_stop_counts_on_all_ranks(results: Results) -> None:
    for (reason,) in results.of("stop_reasons"):
        assert reason == "SIGUSR1"


def test_ranks_stop_behind_the_same_step(results: Results) -> None:
    steps = results.of("agreed_stop")
    assert steps[0] and steps[0][0] >= 3
    assert all(step == steps[0] for step in steps)


# --- Gradients --------------------------------------------------------------------------------------------------------


def test_a_bad_step_on_one_rank_is_rolled_back_bit_for_bit_on_all(results: Results) -> None:
    """The run continues as if the skipped step did not exist. Causes: infinite clips, and variances that overflow."""
    for result in results.of("bad_steps"):
        assert result["flags"] == [[0, 0], [0, 1, 0], [0, 1, 0]]
        assert result["changed"] == []
        assert max(result["differences"]) < 1e-9


def test_bad_steps_in_a_row_end_all_ranks_before_a_checkpoint(results: Results, world: World) -> None:
    for recovered, ended in results.of("bad_steps_in_a_run"):
        assert recovered == "done"
        assert "3 steps in a row" in ended and "numerics.max_bad_steps_in_a_row=3" in ended
        assert f"not finite on ranks [{world.size - 1}]" in ended
    kept = {path.name for path in (results.folder / "recovering" / "checkpoints").iterdir()}
    assert kept == {"step-00000005", "step-00000006"}
    assert not list((results.folder / "diverging" / "checkpoints").iterdir())


def test_bad_steps_are_written_down_with_their_clips(results: Results, world: World, launches: dict[Any, Any]) -> None:
    def lines(found: Results, run_id: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (found.folder / run_id / "bad_steps.jsonl").read_text().splitlines()]

    results.of("bad_steps_in_a_run")
    alone = results_of(WORLDS[0], launches)
    for run_id, spoiled in (("recovering", [0, 1, 3]), ("diverging", [2, 3, 4])):
        written = lines(results, run_id)
        assert [line["step"] for line in written] == spoiled
        for line, expected in zip(written, lines(alone, run_id), strict=True):
            assert line["ranks_not_finite"] == [world.size - 1]
            assert len(line["rows_by_rank"]) == world.size
            assert [row for rows in line["rows_by_rank"] for row in rows] == expected["rows_by_rank"][0]
    metrics = (results.folder / "recovering" / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, metrics) if record["kind"] == "train"]
    # The first two steps were skipped, so there is nothing to log.
    assert [record["step"] for record in records] == [4, 6]
    assert all(math.isfinite(record["loss"]) for record in records)


def test_diagnostics_stand_beside_records_of_good_steps_alone(results: Results) -> None:
    results.of("bad_steps_in_a_run")
    # Both runs log records after steps 1 and 3 (counted from 0).
    for run_id, steps in (("recovering", [6]), ("diverging", [2])):
        metrics = (results.folder / run_id / "metrics.jsonl").read_text().splitlines()
        found = [record for record in map(json.loads, metrics) if record["kind"] == "diagnostics"]
        assert [record["step"] for record in found] == steps
        assert all(record["gradient_norm"] > 0 and len(record["gradient_norms"]) == 62 for record in found)


def test_loss_scale_clipping_and_accumulation_give_the_same_weights_in_every_world(
    results: Results, launches: dict[Any, Any]
) -> None:
    (expected,) = results_of(WORLDS[0], launches).of("scaled_and_clipped")
    assert results.of("scaled_and_clipped") == pytest.approx([expected] * len(results.by_rank), rel=1e-12)


def test_diagnostics_are_those_of_plain_autograd(results: Results) -> None:
    for found in results.of("measured_step"):
        values, norms, weights = found["values"], found["norms"], found["weights"]
        norm = math.sqrt(sum(square**2 for square in norms.values()))
        assert values["gradient_norm"] == pytest.approx(norm, rel=1e-9)
        assert values["gradient_norms"] == pytest.approx(norms, rel=1e-9)
        assert values["weight_norms"] == pytest.approx(weights, rel=1e-9)
        noise, signal = noise_and_signal(found["small_square"], norm**2, small=2, large=8)
        assert (values["gradient_noise"], values["gradient_signal"]) == pytest.approx((noise, signal), rel=1e-6)
        assert set(values["trust_ratios"]) == {
            name for name in norms if name.endswith("weight") and "bn" not in name
        } - {
            "backbone.layer2.0.downsample.1.weight",
            "backbone.layer3.0.downsample.1.weight",
            "backbone.layer4.0.downsample.1.weight",
        }
        for name, ratio in values["trust_ratios"].items():
            clipped = norms[name] * 0.1 / norm
            assert ratio == pytest.approx(0.001 * weights[name] / (clipped + 1e-4 * weights[name]), rel=1e-5), name


def test_half_precision_wire_does_not_overflow_where_the_mean_does_not(results: Results, world: World) -> None:
    for means in results.of("fp16_compression"):
        assert means.pop("too large") == (70000.0 if world.size == 1 else math.inf)
        assert means.pop("sum of fp16") == (60000.0 if world.size == 1 else math.inf)
        assert means == pytest.approx(dict.fromkeys(means, 60000.0), rel=1e-3)


def test_gradients_that_horovod_cannot_take_are_averaged_all_the_same(results: Results, world: World) -> None:
    """bf16, channels_last and two micro-steps, with an optimizer that Horovod could not rebuild."""
    mean_rank = (world.size + 1) / 2
    expected = [number * mean_rank * 1.5 for number in range(8)] * 2
    for means in results.of("reduced_gradients"):
        assert means["channels_last"] == pytest.approx(expected, rel=1e-6)
        assert means["bfloat16"] == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("name", ["horovodrun-2", "mpirun-2"])
def test_a_rank_that_is_done_first_waits_for_the_others(name: str, tmp_path: Path) -> None:
    """Rank 0 closes while the other rank still reduces; without a barrier Horovod would shut down under it."""
    (world,) = (available(world) for world in WORLDS if world.name == name)
    command = world.command(str(CHECKOUT / "tests/world_cases/early_exit.py"))
    done = subprocess.run(command, cwd=CHECKOUT, env=world.environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "reduced while rank 0 was closing" in done.stdout


@pytest.mark.parametrize("name", ["horovodrun-2", "mpirun-2"])
def test_a_rank_that_others_wait_for_leaves_them_their_other_threads(name: str) -> None:
    """Horovod's dynamic process sets would block rank 0 while it holds the GIL, and silence its control thread."""
    (world,) = (available(world) for world in WORLDS if world.name == name)
    command = world.command(str(CHECKOUT / "tests/world_cases/stopped_peer.py"))
    done = subprocess.run(command, cwd=CHECKOUT, env=world.environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the other thread of rank 0 went on" in done.stdout


DISAGREEING = """
import sys
import torch
from distributed.backends.make import make_backend
from distributed.topology import TopologyError, find_topology
topology = find_topology()
groups = {"number": [[[0], [1]], []], "ranks": [[[0]], [[1]]]}[sys.argv[1]][topology.rank]
try:
    make_backend("horovod", topology, torch.device("cpu"), timeout_s=20.0, rank_groups=groups)
except TopologyError as error:
    print(error, flush=True)
"""


@pytest.mark.parametrize("name", ["horovodrun-2", "mpirun-2"])
@pytest.mark.parametrize("difference", ["number", "ranks"])
def test_ranks_with_other_groups_are_refused(name: str, difference: str) -> None:
    (world,) = (available(world) for world in WORLDS if world.name == name)
    command = world.command("-c", DISAGREEING, difference)
    done = subprocess.run(command, cwd=CHECKOUT, env=world.environment, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "Fix: one configuration for all ranks" in done.stdout, done.stdout + done.stderr
