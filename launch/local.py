"""Start the processes of a job on this machine, for the torch backend, and end when they have ended.

python launch/local.py --processes 2 train.py experiment=smoke
python launch/local.py evaluate.py --run outputs/NAME                       one process per GPU, or two without GPUs

Unlike `torchrun --standalone` it opens no port: ranks meet through a file in a folder that only their user can read, and the torch
backend listens on the loopback interface. A signal to this process reaches every rank once. If this process is killed, the
kernel asks the ranks to stop, and kills those that do not handle stop signals yet. The exit code is the job's (docs/operating.md).
"""

import argparse
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime.leftovers import make_temporary_folder, remove_leftovers

# After one rank has failed the others log why, finish a checkpoint and end by themselves. One that has not joined yet cannot.
_GRACE_S = 30.0
_KILL_AFTER_S = 10.0

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1
_FOLDER_PREFIX = "tsm-local-"


def main() -> int:
    parser = argparse.ArgumentParser(description="Start the processes of a job on this machine.")
    parser.add_argument("--processes", type=int, default=None, help="default: one per GPU, or 2 without GPUs")
    parser.add_argument("program", help="train.py or evaluate.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    size = count_gpus() or 2 if options.processes is None else options.processes
    if size < 1:
        parser.error(f"--processes is {size}. Fix: give 1 or more")
    remove_leftovers(Path(tempfile.gettempdir()), _FOLDER_PREFIX)
    folder, held = make_temporary_folder(_FOLDER_PREFIX)
    try:
        return run([sys.executable, options.program, *options.arguments], size, folder, held)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        # The processes of a job that was killed just before this one may still have been ending when it started.
        remove_leftovers(folder.parent, _FOLDER_PREFIX)


def count_gpus() -> int:
    """Count the GPUs that CUDA may use here, by nvidia-smi; 0 without it."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return len([device for device in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if device.strip()])
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return 0
    return len(listed.stdout.splitlines())


def run(command: list[str], size: int, folder: Path, held: int) -> int:
    """Run a command as `size` ranks that meet in `folder`, and keep its descriptor open; returns the job's exit code."""
    ranks: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    for number in _FORWARDED:
        # nohup ignores SIGHUP, and ranks inherit that. Shells ignore SIGINT for a command in the background.
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, forward)
    for rank in range(size):
        ranks.append(_start(command, rank, size, folder, held))
        # It came before this rank was in the list.
        if received:
            ranks[-1].send_signal(received[-1])
    return _exit_code(_wait(ranks))


def _start(command: list[str], rank: int, size: int, folder: Path, held: int) -> "subprocess.Popen[bytes]":
    place = {"TSM_LOCAL_RANK": str(rank), "TSM_LOCAL_SIZE": str(size), "TSM_LOCAL_STORE": str(folder / "store")}
    network = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        command,
        env=network | os.environ | place,
        stdin=subprocess.DEVNULL,
        # Ranks may outlive a killed launcher by a checkpoint.
        pass_fds=[held],
        # In a session of its own, a rank gets a terminal's Ctrl-C from `forward` only, once.
        start_new_session=True,
        preexec_fn=_die_with(os.getpid()),
    )


def _die_with(parent: int) -> Callable[[], None]:
    """Return what a rank does before it starts: ask the kernel to kill it when the launcher ends.

    runtime.stop_signals replaces this by SIGTERM.
    """
    prctl = ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # The launcher may have ended before that.
        if os.getppid() != parent:
            os._exit(1)

    return ask


def _wait(ranks: list["subprocess.Popen[bytes]"]) -> list[int]:
    """Wait until all ranks have ended, and end those that stay after one has failed; returns their exit codes in order of end."""
    codes: list[int] = []
    running = list(ranks)
    failed_s: float | None = None
    while running:
        for rank in [rank for rank in running if rank.poll() is not None]:
            running.remove(rank)
            codes.append(rank.returncode)
            if rank.returncode != 0 and failed_s is None:
                failed_s = time.monotonic()
        over_s = 0.0 if failed_s is None else time.monotonic() - failed_s
        for rank in running:
            if over_s > _GRACE_S + _KILL_AFTER_S:
                rank.kill()
            elif over_s > _GRACE_S:
                rank.terminate()
        time.sleep(0.05)
    return codes


def _exit_code(codes: list[int]) -> int:
    """Return the job's exit code: the first of a rank that chose one, or else 128 + the signal that killed one, as a shell does."""
    failed = [code for code in codes if code != 0]
    chosen = [code for code in failed if code > 0]
    if chosen:
        return chosen[0]
    return 128 - failed[0] if failed else 0


if __name__ == "__main__":
    sys.exit(main())
