"""Whole jobs on the fake GPU (tests/fake_gpu): training, checkpoints, evaluation and two ranks over NCCL on the host.

Computed values have no meaning. Without torch's caching of device memory, every tensor that a kernel should fill is 0.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.fake_gpu.counters import WAITS, counts
from tests.helpers.jobs import Ended, RunningJob, make_clips, start_training
from tests.helpers.worlds import World, available
from tests.world_cases.bodies import Context, job_of, start
from training.loop import STEPS_IN_FLIGHT, train
from training.telemetry.metrics_log import MetricsLog

pytestmark = pytest.mark.fake_gpu

SMALL = [
    "experiment=smoke", "logger=disabled", "distributed.device=cuda", "model.num_frames=4", "batch.global_batch=8",
    "schedule.epochs=2", "schedule.warmup_epochs=1", "evaluation.every_epochs=2", "logger.every_steps=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clips(tmp_path_factory.mktemp("data") / "clips")


@pytest.fixture
def zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs that the test starts see zeros in device memory until a copy fills it."""
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    monkeypatch.setenv("FAKE_GPUS", "2")


@pytest.fixture(scope="module")
def context(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Context]:
    folder = clips.parent / "in_process"
    folder.mkdir()
    made = start(folder)
    yield made
    made.control.close()


def run(world: World, tmp_path: Path, clips: Path, *overrides: str, program: str = "train.py") -> Ended:
    arguments = [*SMALL, f"data.root={clips}", f"outputs={tmp_path}", "run_id=run", *overrides]
    ended = start_training(world, tmp_path / "console.txt", *arguments, program=program).wait(300)
    assert ended.exit_code == 0, ended.output[-5000:]
    assert "is not implemented" not in ended.output
    return ended


@pytest.mark.usefixtures("zeros")
@pytest.mark.parametrize("amp", ["off", "float16"])
def test_a_run_is_saved_resumed_evaluated_and_reported(tmp_path: Path, clips: Path, amp: str) -> None:
    alone = World("none", 1)
    numerics = [f"numerics.amp={amp}", "numerics.channels_last=true", "optimizer.ema_decay=0.9"]
    run(alone, tmp_path, clips, *numerics, "max_steps=3")
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()
    ended = run(alone, tmp_path, clips, *numerics)
    assert "resuming run from step 3" in ended.output and "1 x cuda" in ended.output
    assert (tmp_path / "run" / "report.html").exists() and (tmp_path / "run" / "SUCCESS").exists()
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "evaluation" in kinds
    ended = run(alone, tmp_path, clips, *numerics, program="evaluate.py")
    assert "20 clips" in ended.output


@pytest.mark.usefixtures("zeros")
@pytest.mark.parametrize("launcher", ["torchrun", "horovodrun"])
def test_two_ranks_train_over_nccl(tmp_path: Path, clips: Path, launcher: str) -> None:
    """Batch norm over ranks, fp16 gradient compression, LARS, an evaluation and a checkpoint."""
    world = available(World(launcher, 2))
    backend = "torch" if launcher == "torchrun" else "horovod"
    options = ["optimizer=lars", "numerics.amp=float16", "distributed.gradient_dtype=float16", f"distributed={backend}"]
    # The fake GPU sums nothing, so each rank counts the clips of the other rank as missing.
    options.append("data.max_bad_clips=20")
    ended = run(world, tmp_path, clips, *options)
    assert "2 x cuda" in ended.output
    # NCCL would warn that it had to guess the device of the barrier.
    assert "barrier" not in ended.output
    assert (tmp_path / "run" / "SUCCESS").exists()


def test_the_loop_waits_only_to_stay_a_few_steps_ahead(context: Context) -> None:
    """Allow one wait per step: the one that bounds how far the host runs ahead, and it sleeps."""
    overrides = ["numerics.dtype=float32", "logger.every_steps=100", "max_steps=8", "checkpoint.every_epochs=100"]
    job = job_of(context, "loop", *overrides)
    take_step, seen = job.trainer.step, []

    def step(*arguments: object) -> torch.Tensor:
        seen.append(counts())
        return take_step(*arguments)  # type: ignore[arg-type]

    job.trainer.step = step  # type: ignore[method-assign, assignment]
    job.folder.checkpoints.mkdir(parents=True)
    records = MetricsLog(job.config, job.folder, True, job.first_step, job.recipe.total_steps)
    assert train(job, records) == 0
    records.close(0)
    for before, after in zip(seen[STEPS_IN_FLIGHT + 1 :], seen[STEPS_IN_FLIGHT + 2 :], strict=False):
        waits = {name: after[name] - before[name] for name in WAITS}
        assert waits == dict.fromkeys(WAITS, 0) | {"event_waits": 1}


@pytest.mark.usefixtures("zeros")
@pytest.mark.parametrize(("completion", "waits"), [(None, 0), ("0", 10)])
def test_horovod_queues_reductions_without_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, completion: str | None, waits: int
) -> None:
    """The backend sets HOROVOD_ENABLE_ASYNC_COMPLETION on GPUs; without it the host waits for each reduction."""
    if completion is not None:
        monkeypatch.setenv("HOROVOD_ENABLE_ASYNC_COMPLETION", completion)
    world = available(World("horovodrun", 2))
    job = RunningJob(world.command("tests/fake_gpu/horovod_waits.py"), world.environment, tmp_path / "console.txt")
    ended = job.wait(120)
    assert ended.exit_code == 0, ended.output[-5000:]
    assert f"waits: {waits}, collectives: 10" in ended.output


def test_memory_that_is_too_small_has_a_micro_batch_that_fits(
    tmp_path: Path, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device refuses memory, so torch's allocator raises the error. The advice and micro_batch=auto name the same number."""
    monkeypatch.setenv("FAKE_GPU_BYTES", "700000000")
    large = "pipeline.size=128 model.num_frames=8 batch.bn_group=2 evaluation.batch=2 max_steps=1 pipeline.workers=0".split()
    arguments = [*SMALL, *large, f"data.root={clips}", f"outputs={tmp_path}"]
    alone = World("none", 1)
    refused = start_training(alone, tmp_path / "all.txt", *arguments, "run_id=all").wait(300)
    assert refused.exit_code == 2, refused.output[-5000:]
    assert "CUDA out of memory" in refused.output
    assert refused.output.rstrip().endswith("(in a micro-batch of 8 clips). Fix: batch.micro_batch=4, same result")
    found = start_training(alone, tmp_path / "auto.txt", *arguments, "run_id=auto", "batch.micro_batch=auto").wait(300)
    assert found.exit_code == 0, found.output[-5000:]
    assert "batch.micro_batch=auto: micro-batches of 4 clips" in (tmp_path / "auto" / "log.txt").read_text()
