"""plan.py: derived numbers equal published ones, estimated memory equals real tensors, problems equal train.py's."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed.backends.single import SingleBackend
from distributed.batch_norm.layer import convert_batch_norm
from distributed.checkpoint.store import Checkpoint, Snapshot, write_snapshot
from distributed.topology import Topology
from tests.helpers.worlds import CHECKOUT
from tests.training.config.test_config import CONF, compose, config_of
from training.build.model import network_of
from training.build.recipe import recipe_of
from training.config.schema import Config
from training.errors import ConfigError
from training.optim.optimizers import make_optimizer
from training.planning import memory
from training.planning.command import run_plan
from training.planning.estimates import clip_bytes, estimate_rates, ring_bytes
from training.planning.memory import LiveBytes, StepCosts, step_costs
from training.planning.output import as_dict
from training.planning.plan import make_plan
from training.recipe import Execution, Recipe, fitting_worlds, make_execution
from training.runs.resume import state_tensors

LARGE = ("kinetics_1536", "kinetics_384", "kinetics_1536_lars")
SMALL = "experiment=smoke pipeline.size=32 model.num_frames=4 batch.global_batch=8".split()


def small(*overrides: str) -> Config:
    return config_of(*SMALL, *overrides)


def costs(config: Config, world: int = 1) -> StepCosts:
    batch = config.batch
    execution = make_execution(batch.global_batch, batch.bn_group or batch.global_batch, world, batch.micro_batch_limit)
    return costs_of(config, execution)


def costs_of(config: Config, execution: Execution) -> StepCosts:
    network = config.model, config.data.num_classes, config.pipeline.size
    return step_costs(*network, config.numerics, config.optimizer, execution)


def laid_out(config: Config) -> tuple[Recipe, Execution]:
    """Recipe and execution without manifests, as plan.py derives them."""
    batch, clips = config.batch, config.data.train_clips
    world = config.distributed.world_size or config.plan.world_size
    assert clips is not None and world is not None and batch.bn_group is not None
    return recipe_of(config, clips, ""), make_execution(
        batch.global_batch, batch.bn_group, world, batch.micro_batch_limit
    )


# --- The large runs ---------------------------------------------------------------------------------------------------


def test_the_numbers_of_the_published_run() -> None:
    """arXiv:1910.00932 and derived values: 12,288 clips, 14 min 13 s, 24.3 M parameters, 33 GFLOPs per clip."""
    plan = as_dict(make_plan(config_of("experiment=kinetics_1536")))
    recipe, schedule, network = plan["recipe"], plan["recipe"]["schedule"], plan["network"]
    assert (recipe["global_batch"], recipe["bn_group"], recipe["num_rows"]) == (12_288, 8, 239_781)
    assert recipe["steps_per_epoch"] == pytest.approx(19.51, abs=0.005)
    assert (recipe["total_steps"], schedule["warmup_steps"], schedule["milestone_steps"]) == (1_951, 98, [781, 1_561])
    assert schedule["peak"] == pytest.approx(1.92)
    assert plan["execution"] == {
        "world": 1_536, "global_batch": 12_288, "micro_batch": 8, "accumulation": 1, "bn_ghosts": 1, "bn_ranks": 1,
    }  # fmt: skip
    assert network["parameters"] == pytest.approx(24.3e6, rel=0.005)
    assert network["gradient_bytes"] == pytest.approx(97.3e6, rel=0.005)
    assert network["clip_multiply_adds"] == pytest.approx(33e9, rel=0.02)
    assert network["ring_bytes_per_process"] == pytest.approx(2 * 97.3e6, rel=0.005)
    assert (plan["rates"], plan["time_to_train_s"]) == (None, None), "no cluster, no time"
    assert plan["costs_per_process"]["bn_messages"] == 0
    # The V100s of the published run had 16 GB, in float32 as in half precision.
    assert 2 * 2**30 < plan["costs_per_process"]["peak_bytes"] < 16e9


# batch, decay, peak rate, warm-up steps, optimizer, smoothing, processes
LARGE_SETTINGS: dict[str, tuple[Any, ...]] = {
    "kinetics_1536": (12_288, "step", 1.92, 98, "sgd", 0.0, 1_536),
    "kinetics_384": (3_072, "step", 0.48, 390, "sgd", 0.0, 384),
    "kinetics_1536_lars": (12_288, "poly2", 10.0, 98, "lars", 0.1, 1_536),
}


@pytest.mark.parametrize("name", LARGE)
def test_the_settings_of_the_large_runs(name: str) -> None:
    config = config_of(f"experiment={name}")
    recipe, execution = laid_out(config)
    schedule, optimizer = recipe.schedule, config.optimizer
    assert (
        recipe.global_batch, schedule.decay, pytest.approx(schedule.peak), schedule.warmup_steps, optimizer.name,
        optimizer.label_smoothing, config.plan.world_size,
    ) == LARGE_SETTINGS[name]  # fmt: skip
    assert (recipe.bn_group, execution.micro_batch, execution.accumulation) == (8, 8, 1)
    assert (optimizer.momentum, optimizer.weight_decay, config.model.dropout) == (0.9, 1e-4, 0.5)
    assert (config.model.init, config.model.backbone, config.schedule.epochs) == ("imagenet", "resnet50", 100)
    if name == "kinetics_1536_lars":
        assert (schedule.end, schedule.warmup_start, optimizer.trust_coefficient) == (1e-4, 0.0, 0.001)
        assert (optimizer.clip_norm, optimizer.classifier_lr_multiplier) == (None, 1.0)


def test_the_other_remembered_schedule() -> None:
    schedule = laid_out(config_of("experiment=kinetics_1536", "schedule.decay=cosine"))[0].schedule
    assert [schedule.learning_rate(step) for step in (98, 1_024, 1_950)] == pytest.approx([1.92, 0.961, 0.0], abs=0.002)


def test_rates_follow_from_a_step_time() -> None:
    config = config_of("experiment=kinetics_1536")
    recipe, _ = laid_out(config)
    decoded_bytes = clip_bytes(config.model.num_frames, config.pipeline.size)
    told = estimate_rates(2.0, "plan.step_s", recipe, decoded_bytes, 33 * 10**9, 384)
    assert (told.step_s, told.step_s_from, told.clips_per_s) == (2.0, "plan.step_s", 6_144)
    assert told.clips_per_s_per_process == 16
    assert told.decoded_bytes_per_s == 6_144 * 8 * 3 * 224 * 224
    assert told.tflop_s_per_process == pytest.approx(16 * 6 * 33e9 / 1e12)


@pytest.mark.parametrize("name", LARGE)
def test_what_is_reconstructed_is_said(name: str) -> None:
    header = (CONF / "experiment" / f"{name}.yaml").read_text()
    assert re.search(r"^# (Source|Published)", header, re.MULTILINE)
    assert "# Reconstructed: " in header or " Reconstructed: " in header
    assert "Not run here to the end" in header


@pytest.mark.parametrize("world", [1, 4, 48, 192, 384])
def test_the_same_recipe_on_fewer_processes(world: int) -> None:
    """Gradient accumulation with 8 clips per micro-step, in the same batch-norm groups."""
    recipe, execution = laid_out(config_of("experiment=kinetics_1536", f"distributed.world_size={world}"))
    assert execution == Execution(world, 12_288, 8, 1_536 // world, 1, 1)
    assert recipe == laid_out(config_of("experiment=kinetics_1536"))[0]


# --- Memory and messages ----------------------------------------------------------------------------------------------


def test_live_bytes_of_real_tensors() -> None:
    with LiveBytes() as live:
        # 4,000 bytes.
        x = torch.zeros(1_000)
        # 8,000 bytes more.
        y = x.double()
        view = y[10:].view(-1)
        assert live.now == 12_000
        del x, y
        assert live.now == 8_000
        del view
        assert live.now == 0
        weight = torch.ones(1_000, requires_grad=True)
        # exp keeps its result for backward; the product is freed.
        loss = (weight * 2).exp().sum()
        assert live.now == 4_000 + 4_000 + 4
        loss.backward()
        del loss
        # Weight and gradient.
        assert live.now == 8_000
    # During backward: the weight, the kept result, the product of that and the loss's gradient; plus the loss and its
    # gradient.
    assert live.peak == 3 * 4_000 + 2 * 4


def video(config: Config, clips: int) -> Tensor:
    size = config.pipeline.size
    return torch.empty(clips, config.model.num_frames, 3, size, size, dtype=torch.uint8)


class _OnRealTensors(LiveBytes):
    """Count the bytes of tensors with real values, where step_costs counts meta tensors."""

    def __init__(self, config: Config, execution: Execution) -> None:
        super().__init__()
        network = network_of(config.model, config.data.num_classes)
        alone = SingleBackend(Topology("none", 0, 1, 0, 1, 0, "localhost"), torch.device("cpu"))
        convert_batch_norm(network, alone, execution.bn_ghosts, [], execution.accumulation)
        with self:
            self.hold(network.state_dict(keep_vars=True).values())
            self.optimizer = make_optimizer(network, config.optimizer)
            memory._forward_and_backward(network, video(config, execution.micro_batch), config.numerics)
        self.gradients: list[Tensor | None] = [parameter.grad for parameter in network.parameters()]


@pytest.mark.parametrize(
    "overrides",
    [[], ["batch.bn_group=2"], ["numerics.amp=bfloat16"], ["model.temporal_pool=true", "numerics.channels_last=false"]],
)
def test_memory_of_shapes_is_that_of_numbers(overrides: list[str]) -> None:
    config = small(*overrides)
    batch = config.batch
    execution = make_execution(batch.global_batch, batch.bn_group or batch.global_batch, 1)
    real = _OnRealTensors(config, execution)
    counted = costs_of(config, execution)
    assert counted.peak_bytes == pytest.approx(real.peak, rel=0.01)
    assert counted.gradients_bytes == sum(gradient.nbytes for gradient in real.gradients if gradient is not None)


def test_memory_is_what_torchs_own_tracker_counts() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    config = small()
    with torch.device("meta"):
        network = network_of(config.model, config.data.num_classes)
    with FakeTensorMode(allow_non_fake_inputs=True):
        network.to_empty(device="cpu")
        optimizer = make_optimizer(network, config.optimizer)
        tracker = MemTracker()
        tracker.track_external(network, optimizer)
        with tracker:
            memory._forward_and_backward(network, video(config, config.batch.global_batch), config.numerics)
        (peak,) = tracker.get_tracker_snapshot("peak").values()
    assert costs(config).peak_bytes == pytest.approx(peak["Total"], rel=0.01)


def test_activations_grow_with_the_micro_batch_and_shrink_with_precision() -> None:
    eight, four = costs(small()), costs(small("batch.micro_batch=4", "batch.bn_group=4"))
    activations = eight.peak_bytes - eight.weights_bytes - eight.optimizer_bytes
    # Half of the activations, plus the gradients of the previous micro-step.
    assert four.peak_bytes == pytest.approx(eight.peak_bytes - activations / 2 + four.gradients_bytes, rel=0.1)
    assert four.peak_bytes > eight.peak_bytes - activations
    large = ["batch.global_batch=32", "pipeline.size=112"]
    whole, half, double = (
        costs(small(*large, *more)) for more in ([], ["numerics.amp=float16"], ["numerics.dtype=float64"])
    )
    # Weights and input keep their size.
    assert 0.5 < half.peak_bytes / whole.peak_bytes < 0.65
    # Frames and pooling indices are integers, so they do not grow.
    assert 1.9 < double.peak_bytes / whole.peak_bytes < 2


def test_optimizers_cost_their_state() -> None:
    sgd, lars = costs(small()), costs(small("optimizer.name=lars"))
    averaged = costs(small("optimizer.ema_decay=0.99"))
    assert sgd.optimizer_bytes == sgd.gradients_bytes
    assert lars.optimizer_bytes == 2 * sgd.gradients_bytes
    assert averaged.optimizer_bytes == 2 * sgd.gradients_bytes
    assert averaged.checkpoint_bytes == sgd.checkpoint_bytes + sgd.gradients_bytes


@pytest.mark.parametrize("overrides", [[], ["optimizer.name=lars", "optimizer.ema_decay=0.9"]])
def test_checkpoint_bytes_are_those_of_the_files(tmp_path: Path, overrides: list[str]) -> None:
    from training.optim.ema import EMA

    config = small(*overrides)
    network = network_of(config.model, config.data.num_classes)
    optimizer, decay = make_optimizer(network, config.optimizer), config.optimizer.ema_decay
    average = None if decay is None else EMA(network, decay)
    saved = Checkpoint(network.state_dict(), state_tensors(network, optimizer, average), {"step": 1})
    folder = write_snapshot(tmp_path, Snapshot().take(saved), keep=1)
    size_bytes = sum(path.stat().st_size for path in folder.iterdir())
    assert costs(config).checkpoint_bytes == pytest.approx(size_bytes, rel=0.005)


def test_messages_of_batch_norm_over_ranks() -> None:
    """ResNet-18 has 20 batch norms with 4,800 channels in total: two messages each, per micro-step."""
    over_two = costs(small("batch.bn_group=8", "batch.global_batch=16", "batch.micro_batch=4"), world=2)
    assert over_two.bn_messages == 2 * 20 * 2
    once = costs(small("batch.bn_group=8"), world=2)
    assert (once.bn_messages, over_two.bn_message_bytes) == (40, 2 * once.bn_message_bytes)
    # At least two numbers of 4 bytes per channel and direction.
    assert once.bn_message_bytes >= 4 * 4 * 4_800
    assert costs(small("batch.bn_group=4"), world=2).bn_messages == 0


def test_what_a_ring_sends() -> None:
    assert [ring_bytes(100, world) for world in (1, 2, 4)] == [0, 100, 150]


# --- Problems ---------------------------------------------------------------------------------------------------------


def problems(capsys: pytest.CaptureFixture[str], *overrides: str) -> tuple[int, str, list[str]]:
    """`(exit code, the plan, its problems)`."""
    code = run_plan(lambda: compose(*overrides))
    said = capsys.readouterr()
    return code, said.out, said.err.splitlines()


def test_all_problems_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, text, found = problems(
        capsys, "experiment=kinetics_1536", f"data.root={tmp_path}", f"outputs={tmp_path / 'file' / 'outputs'}",
        "model.init=gone.pth", "distributed.world_size=1000", "evaluation.split=test",
    )  # fmt: skip
    assert code == 2
    for says in (
        "gone.pth does not exist",
        "does not divide over 1000 processes. Fix: use 1, 2, 3, 4, 6, 8,", f"{tmp_path / 'file'} is a file. Fix: outputs=",
        "evaluation.split=test is for evaluate.py",
    ):  # fmt: skip
        assert len([line for line in found if says in line]) == 1, says
    assert len(found) == 4
    assert "problems   4, below" in text
    assert re.search(r"^missing    train.arrow and val.arrow in ", text, re.MULTILINE)
    assert "1.92 at 12288" in text, "what does not depend on them is still said"


@pytest.mark.parametrize("world", [5, 7, 1_000])
def test_a_world_that_does_not_fit_is_told_as_train_tells_it(capsys: pytest.CaptureFixture[str], world: int) -> None:
    with pytest.raises(ConfigError) as refused:
        make_execution(12_288, 8, world, 8)
    code, text, found = problems(capsys, "experiment=kinetics_1536", f"distributed.world_size={world}")
    assert code == 2
    assert f"error (plan): {refused.value}" in found
    fitting = ", ".join(map(str, fitting_worlds(12_288, 8, 8)))
    assert f"worlds     of {fitting} processes fit" in text


# experiment: training clips, steps per epoch
WITHOUT_DATA = {
    "kinetics_single_node": (239_781, "1873.29"),
    "kinetics_1536": (239_781, "19.51"),
    "something_v1": (86_017, "1344.02"),
    "something_v2": (168_913, "2639.27"),
    "something_v2_64": (168_913, "329.91"),
    "jester": (118_562, "1852.53"),
    "ucf101_finetune": (9_537, "149.02"),
    "hmdb51_finetune": (3_570, "55.78"),
}


@pytest.mark.parametrize("name", WITHOUT_DATA)
def test_a_recipe_is_planned_before_the_data_is_here(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    clips, steps = WITHOUT_DATA[name]
    initial = ["model.init=random"] if name.endswith("finetune") else []
    code, text, found = problems(capsys, f"experiment={name}", f"data.root={tmp_path}", *initial)
    assert code == 0
    assert not found
    (missing,) = [line for line in text.splitlines() if line.startswith("missing ")]
    assert f"train.arrow and val.arrow in {tmp_path} (python prepare.py" in missing
    assert f"clips      {clips}: as published (data.train_clips)" in text
    assert re.search(
        rf"^recipe     {clips} clips, \d+ per step = {re.escape(steps)} steps per epoch", text, re.MULTILINE
    )
    assert re.search(r"^rate       ", text, re.MULTILINE)


def test_every_published_data_set_says_its_training_clips() -> None:
    """All but generated data sets, whose size is configurable. The header of the file and the key agree."""
    for path in sorted((CONF / "data").glob("*.yaml")):
        text = path.read_text()
        clips = config_of("experiment=kinetics_single_node", f"data={path.stem}", "pipeline.flip=off").data.train_clips
        assert (clips is None) == (path.stem in ("shapes", "motions")), path.name
        if clips not in (None, 239_781):
            assert f"{clips:,}" in text.splitlines()[0], path.name


def test_missing_data_is_a_problem_only_of_a_run_that_is_to_start(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, text, found = problems(capsys, "experiment=smoke", f"data.root={tmp_path}")
    assert (code, found) == (0, [])
    assert "problems   none: train.py would start once nothing is missing" in text
    assert "steps per epoch" not in text, "no manifest and no published number: nothing to count steps with"
    assert "GFLOPs per clip" in text and "GiB per process" in text
    starting = ("plan.write_config=true", "run_id=new", f"outputs={tmp_path}")
    code, _, found = problems(capsys, "experiment=smoke", f"data.root={tmp_path / 'none'}", *starting)
    assert code == 3
    assert len([line for line in found if "no such manifest" in line]) == 2


def test_precision_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def line(*overrides: str) -> str:
        text = problems(capsys, "experiment=kinetics_1536", f"data.root={tmp_path}", *overrides)[1]
        return next(line for line in text.splitlines() if line.startswith("numerics "))

    fp32, tf32 = "numerics   float32", "TF32 on GPUs that have it"
    assert line() == f"{fp32}, no autocast, contiguous, {tf32}; evaluation: no autocast"
    assert line("numerics=gpu", "evaluation.amp=float16") == (
        f"{fp32}, bfloat16 autocast, channels_last, {tf32}; evaluation: float16 autocast"
    )
    assert line("numerics.dtype=float64", "numerics.deterministic=true") == (
        "numerics   float64, no autocast, contiguous, deterministic; evaluation: no autocast"
    )
    json_file = tmp_path / "plan.json"
    line("numerics=gpu_fp16", f"plan.json={json_file}")
    told = json.loads(json_file.read_text())["numerics"]
    assert (told["amp"], told["channels_last"], told["evaluation_amp"]) == ("float16", True, "off")


def test_a_wrong_value_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, found = problems(capsys, "experiment=smoke", "model.dropout=2")
    assert (code, len(found)) == (2, 1)
    assert "model.dropout must be in [0, 1)" in found[0]


def test_first_weights_are_known_by_their_content(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"weights")
    plan = make_plan(small(f"model.init={tmp_path / 'weights.pth'}", "data.train_clips=100", f"data.root={tmp_path}"))
    assert plan.recipe is not None
    assert plan.recipe.model["init"] == f"sha256:{hashlib.sha256(b'weights').hexdigest()}"
    assert plan.fingerprint is None, "the manifest is part of it"


def test_under_a_launcher_it_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    code, _, found = problems(capsys, "experiment=smoke", f"data.root={tmp_path}")
    assert code == 2
    assert "plan.py runs in one process only, and torchrun started 2" in found[0]


@pytest.mark.parametrize("path", ["rate.unknown", "no/such/folder/rate.png"])
def test_a_plot_that_cannot_be_written_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path, path: str) -> None:
    code, _, found = problems(
        capsys, *SMALL, "data.train_clips=100", f"data.root={tmp_path}", f"plan.plot={tmp_path / path}"
    )
    assert code == 2
    assert "Fix: another path" in found[-1]


# --- Agreement with train.py ------------------------------------------------------------------------------------------


def call(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, program, *arguments], cwd=CHECKOUT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, and a run of one step on them."""
    folder = tmp_path_factory.mktemp("plan")
    done = call("prepare.py", "shapes", "--root", str(folder / "clips"), "--train-clips", "40", "--val-clips", "10")
    assert done.returncode == 0, done.stderr
    done = call("train.py", *of_run(folder), "max_steps=1", "logger=disabled", "distributed=single")
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "printed").write_text(done.stdout)
    return folder


def of_run(folder: Path) -> list[str]:
    options = [*SMALL, "pipeline.workers=0", "pipeline.decoder=pyav", "schedule.epochs=2", "run_id=run"]
    return [*options, f"data.root={folder / 'clips'}", f"outputs={folder}"]


@pytest.mark.slow
def test_train_prints_the_same_lines(folder: Path, tmp_path: Path) -> None:
    """The plan.py command on the run's own folder, whose checkpoint train.py would resume from."""
    json_file, plot = tmp_path / "plan.json", tmp_path / "rate.png"
    done = call("plan.py", *of_run(folder), f"plan.json={json_file}", f"plan.plot={plot}", "plan.step_s=0.5")
    assert done.returncode == 0, done.stdout + done.stderr
    planned = done.stdout.splitlines()
    printed = (folder / "printed").read_text().splitlines()
    for name in ("recipe ", "rate ", "batch norm ", "network ", "numerics ", "execution "):
        (line,) = [line for line in printed if line.startswith(name)]
        assert line in planned
    (gradients,) = [line for line in printed if line.startswith("gradients ")]
    assert any(line.startswith(gradients) for line in planned)
    assert "problems   none: train.py would start" in planned
    assert "resuming run from step 1" in planned
    told = json.loads(json_file.read_text())
    assert f"recipe {told['recipe']['fingerprint']} " in printed[0]
    assert (told["exit_code"], told["problems"], told["recipe"]["num_rows"]) == (0, [], 40)
    sizes = [path.stat().st_size for path in (folder / "clips" / "train").rglob("*") if path.is_file()]
    assert len(sizes) == 40
    assert told["stored_clip_bytes"] == pytest.approx(sum(sizes) / 40)
    assert any(line.startswith("at         0.5 s per step (plan.step_s): 16 clips/s, 16.0 (") for line in planned)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_configuration_is_written_for_a_run_that_could_start_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ("plan.write_config=true", f"outputs={tmp_path}", "data.root=/nowhere")
    assert run_plan(lambda: compose(*SMALL, *wanted, "run_id=here")) == 3
    assert list(tmp_path.iterdir()) == []
    assert run_plan(lambda: compose(*SMALL, *wanted)) == 2
    assert "plan.write_config=true needs the name of the run. Fix: run_id=NAME" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_of_another_recipe_is_a_problem(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, found = problems(capsys, *of_run(folder), "optimizer.lr=0.5")
    assert code == 2
    assert len(found) == 1
    assert "holds a run of another recipe" in found[0] and "optimizer.lr: 0.03 then, 0.5 now" in found[0]


@pytest.mark.slow
def test_clips_that_are_gone_are_a_problem(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    shutil.copytree(folder / "clips", clips)
    gone, cut = sorted(path for path in clips.rglob("*") if path.suffix == ".mp4" and "val" in str(path))[:2]
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:100])
    options = [*SMALL, f"data.root={clips}", f"outputs={tmp_path}"]
    code, _, found = problems(capsys, *options)
    assert code == 3
    assert len(found) == 1
    assert "the files of 2 of 10 checked clips are missing" in found[0]
    assert "Fix: restore the files, or make the manifest again (python prepare.py shapes" in found[0]
    assert problems(capsys, *options, "data.max_bad_clips=2")[0] == 0
