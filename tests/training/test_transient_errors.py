"""Errors of networks, GPUs and disks are requeued; those of the program are not."""

import errno
import os
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.helpers.jobs import make_clips, start_training, wait_for_record
from tests.helpers.worlds import World, available
from training.main import describe_error
from training.transient_errors import is_transient


class HorovodInternalError(RuntimeError):
    """As Horovod's, which may not be installed."""


TRANSIENT = [
    dist.DistBackendError("NCCL error in: ncclSystemError"),
    dist.DistNetworkError("The client socket has timed out"),
    HorovodInternalError("HorovodAllreduce grad has been shut down"),
    RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:4711"),
    RuntimeError(
        "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation to complete"
    ),
    torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered", 214),
    torch.AcceleratorError("CUDA error: unspecified launch failure", 719),
    RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
    OSError(errno.ESTALE, os.strerror(errno.ESTALE), "/runs/x"),
    ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)),
]
LASTING = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700),
    torch.AcceleratorError("CUDA error: device-side assert triggered", 710),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    RuntimeError("Address already in use"),
    KeyError("ECC"),
    FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
    BrokenPipeError(errno.EPIPE, "Broken pipe"),
]


@pytest.mark.parametrize("error", TRANSIENT, ids=str)
def test_a_fault_of_the_machines_is_requeued(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    message, code = describe_error(error, None)
    assert code == 75 and "A restart may succeed (traceback above)" in message


@pytest.mark.parametrize("error", LASTING, ids=str)
def test_an_error_of_the_program_is_not(error: Exception) -> None:
    assert not is_transient(error)


@pytest.mark.slow
@pytest.mark.parametrize("world", [World("local", 2), World("horovodrun", 2)], ids=lambda world: world.name)
def test_a_connection_between_living_ranks_that_is_reset_is_requeued(world: World, tmp_path: Path) -> None:
    """The kernel closes all connections of rank 1, as a firewall or a switch may."""
    arguments = (
        "experiment=smoke logger=disabled logger.every_steps=1 pipeline.size=32 model.num_frames=4 pipeline.decoder=pyav "
        "pipeline.workers=0 batch.global_batch=8 schedule.warmup_epochs=0 schedule.epochs=4000 run_id=reset"
    ).split()
    clips = make_clips(tmp_path / "clips")
    job = start_training(available(world), tmp_path / "log", *arguments, f"data.root={clips}", f"outputs={tmp_path}")
    wait_for_record(tmp_path / "reset" / "metrics.jsonl", "train", 180)
    rank = job.ranks()[1]
    shown = subprocess.run(["ss", "-Htnp", "state", "established"], capture_output=True, text=True, check=True).stdout
    for line in shown.splitlines():
        if f"pid={rank}," in line:
            *_, source, destination = line.split()[:4]
            subprocess.run(["ss", "-K", "src", source, "dst", destination], capture_output=True, check=True)
    ended = job.wait(60)
    assert ended.left_running == []
    assert '"exit_code": 75' in (tmp_path / "reset" / "outcome.json").read_text(), ended.output
