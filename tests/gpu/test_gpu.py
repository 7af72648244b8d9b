"""GPU behaviour: run by `make test-gpu` where CUDA is available, skipped with a reason elsewhere."""

from pathlib import Path

import pytest
import torch
from torch import nn

from distributed.backends.make import pick_device
from distributed.backends.single import SingleBackend
from distributed.batch_norm.layer import convert_batch_norm
from distributed.checkpoint.store import Checkpoint, load_checkpoint
from distributed.checkpoint.writer import CheckpointWriter
from distributed.topology import Topology
from pipelines.loading.dali_graph import DaliError, import_dali
from tests.helpers.jobs import make_clips, start_training
from tests.helpers.worlds import World
from training.build.normalise import Normaliser
from training.config.schema import NumericsConfig, OptimizerConfig
from training.optim.optimizers import make_optimizer, set_learning_rate
from tsm.dropout import uniform_of
from tsm.networks import build_network
from tsm.shift import temporal_shift

pytestmark = pytest.mark.gpu

ALONE = Topology("none", 0, 1, 0, 1, 0, "here")


@pytest.mark.fake_gpu
def test_a_lone_process_takes_the_first_gpu() -> None:
    assert pick_device("auto", ALONE) == torch.device("cuda", 0)


def test_shift_is_the_cpu_one() -> None:
    x_NTCHW = torch.randn(2, 8, 24, 5, 5)
    assert temporal_shift(x_NTCHW.cuda()).cpu().equal(temporal_shift(x_NTCHW))


def test_dropout_masks_are_the_cpu_ones() -> None:
    seed_N = torch.tensor([1, 2**40 + 3, 2**62])
    assert uniform_of(seed_N.cuda(), 4096).cpu().equal(uniform_of(seed_N, 4096))


@pytest.mark.parametrize("channels_last", [False, True])
def test_normalised_clips_are_the_cpu_ones(channels_last: bool) -> None:
    video_NTCHW = torch.randint(256, (2, 8, 3, 16, 16), dtype=torch.uint8)
    numerics = NumericsConfig(channels_last=channels_last)
    on_gpu_NTCHW = Normaliser(torch.device("cuda"), numerics)(video_NTCHW.pin_memory())
    on_cpu_NTCHW = Normaliser(torch.device("cpu"), numerics)(video_NTCHW)
    torch.testing.assert_close(on_gpu_NTCHW.cpu(), on_cpu_NTCHW, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ghosts", [1, 2])
def test_gradients_are_the_cpu_ones(ghosts: int) -> None:
    """A whole TSM in float64, with one batch-norm group and with two groups (ghosts)."""
    gradients = []
    x_NTCHW = torch.randn(4, 4, 3, 32, 32, dtype=torch.float64)
    label_N = torch.tensor([0, 1, 2, 3])
    for device in (torch.device("cpu"), torch.device("cuda")):
        torch.manual_seed(0)
        network = build_network("resnet18", 10, num_frames=4, dropout=0.0).double()
        convert_batch_norm(network, SingleBackend(ALONE, device), ghosts, [], accumulation=1)
        network.to(device)
        nn.functional.cross_entropy(network(x_NTCHW.to(device)), label_N.to(device)).backward()
        gradients.append([parameter.grad.cpu() for parameter in network.parameters() if parameter.grad is not None])
    for on_cpu, on_gpu in zip(*gradients, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-8, atol=1e-10)


def test_a_checkpoint_is_what_the_tensors_were_when_the_save_returned(tmp_path: Path) -> None:
    """The copy to pinned memory is ordered after pending GPU work, and training continues at once."""
    x_NN = torch.randn(2000, 2000, device="cuda")
    weight_NN = torch.zeros_like(x_NN)
    for _ in range(50):
        weight_NN += x_NN @ x_NN
    channels_last = torch.randn(4, 8, 5, 5, device="cuda").contiguous(memory_format=torch.channels_last)
    expected = {"weight": weight_NN.clone(), "channels_last": channels_last.clone(), "step": torch.tensor(3)}
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(
        Checkpoint({"weight": weight_NN, "channels_last": channels_last, "step": torch.tensor(3)}, {}, {"step": 3})
    )
    weight_NN.zero_()
    channels_last.zero_()
    writer.wait()
    (written,) = writer.ended()
    assert written.failed is None
    loaded = load_checkpoint(tmp_path / "step-00000003").network
    assert all(loaded[name].equal(tensor.cpu()) for name, tensor in expected.items())


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_mixed_precision_takes_a_step(amp: torch.dtype) -> None:
    torch.manual_seed(0)
    network = build_network("resnet18", 10, num_frames=4).cuda().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    convert_batch_norm(network, SingleBackend(ALONE, torch.device("cuda")), 2, [], accumulation=1)
    optimizer = make_optimizer(network, OptimizerConfig())
    set_learning_rate(optimizer, 0.1)
    # At GradScaler's initial scale, 65536, the classifier's gradient overflows with one seed in four.
    scaler = torch.amp.GradScaler("cuda", init_scale=1024, enabled=amp == torch.float16)
    before = network.classifier.weight.detach().clone()
    with torch.autocast("cuda", amp):
        logit_NK = network(torch.randn(4, 4, 3, 32, 32, device="cuda"))
        loss = nn.functional.cross_entropy(logit_NK, torch.arange(4, device="cuda"))
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    assert loss.isfinite()
    assert not network.classifier.weight.equal(before)


@pytest.mark.slow
@pytest.mark.parametrize("bn_group", ["2", "null"])
@pytest.mark.parametrize("pipeline", ["torch", "dali"])
def test_a_job_with_a_process_for_each_gpu_reduces_there(tmp_path: Path, pipeline: str, bn_group: str) -> None:
    """NCCL steps with one process per GPU, batch norm within and over ranks; DALI decodes by NVDEC."""
    if pipeline == "dali":
        try:
            import_dali()
        except DaliError as error:
            pytest.skip(str(error))
    world = World("torchrun", torch.cuda.device_count())
    arguments = "experiment=smoke distributed.device=cuda logger=disabled max_steps=3".split()
    paths = [f"data.root={make_clips(tmp_path / 'clips')}", f"outputs={tmp_path}"]
    options = [f"pipeline={pipeline}", f"batch.bn_group={bn_group}"]
    ended = start_training(world, tmp_path / "console.txt", *arguments, *options, *paths).wait(300)
    assert ended.exit_code == 0, ended.output[-5000:]
    assert f"{world.size} x cuda, backend torch" in ended.output
    assert ("decodes h264 on cuda" in ended.output) == (pipeline == "dali")
