"""launch/local.py: ranks on one machine that open no port to others, get each signal once, and end with their launcher."""

import os
import signal
import subprocess
import sys
import time
from ast import literal_eval
from pathlib import Path

import pytest

from runtime.leftovers import make_temporary_folder
from tests.helpers.jobs import make_clips, start_training, wait_for_record
from tests.helpers.processes import LISTENING, listening
from tests.helpers.worlds import CHECKOUT, World

pytestmark = pytest.mark.slow

LIMIT_S = 60


def start(folder: Path, text: str, *arguments: str, processes: int = 2) -> "subprocess.Popen[bytes]":
    """Start ranks that run this text, in a process group of their own, as a terminal does."""
    program = folder / "program.py"
    program.write_text("import os, signal, sys, time\nrank = int(os.environ['TSM_LOCAL_RANK'])\n" + text)
    command = [sys.executable, "launch/local.py", "--processes", str(processes), str(program), *arguments]
    # The tests may run under nohup.
    return subprocess.Popen(
        command, cwd=CHECKOUT, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)
    )


def wait_for(path: Path) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not path.exists():
        assert time.monotonic() < deadline_s, f"no {path}"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_ranks_get_their_place_arguments_and_a_private_folder(tmp_path: Path) -> None:
    text = """
folder = os.path.dirname(os.environ["TSM_LOCAL_STORE"])
seen = [os.environ["TSM_LOCAL_SIZE"], sys.argv[2:], os.stat(folder).st_mode & 0o777, folder]
open(f"{sys.argv[1]}/{rank}", "w").write(repr(seen))
"""
    assert start(tmp_path, text, str(tmp_path), "experiment=smoke", "--run", processes=3).wait(LIMIT_S) == 0
    seen = [literal_eval((tmp_path / str(rank)).read_text()) for rank in range(3)]
    assert [each[:3] for each in seen] == [["3", ["experiment=smoke", "--run"], 0o700]] * 3
    (folder,) = {each[3] for each in seen}
    assert not Path(folder).exists()


@pytest.mark.parametrize(
    ("text", "exit_code"),
    [
        ("sys.exit(0)", 0),
        ("sys.exit(3 if rank == 1 else 0)", 3),
        # A rank that is killed chose no code: the others did.
        ("time.sleep(0.5 * (1 - rank)); os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else sys.exit(75)", 75),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 128 + signal.SIGSEGV),
    ],
)
def test_the_exit_code_is_the_jobs(tmp_path: Path, text: str, exit_code: int) -> None:
    assert start(tmp_path, text).wait(LIMIT_S) == exit_code


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
def test_a_signal_reaches_every_rank_once(tmp_path: Path, name: str) -> None:
    """As a terminal sends it: to the launcher's whole process group."""
    text = f"""
count = 0
def note(number, frame):
    global count
    count += 1
signal.signal(signal.{name}, note)
open(sys.argv[1] + str(rank), "w").close()
while not count:
    time.sleep(0.01)
time.sleep(0.3)
sys.exit(70 + count)
"""
    job = start(tmp_path, text, str(tmp_path / "ready"))
    for rank in range(2):
        wait_for(tmp_path / f"ready{rank}")
    os.killpg(job.pid, signal.Signals[name])
    assert job.wait(LIMIT_S) == 71


def test_ranks_end_when_their_launcher_is_killed(tmp_path: Path) -> None:
    text = """
path = f"{sys.argv[1]}/{rank}"
open(path, "w").write(str(os.getpid()))
os.rename(path, path + ".pid")
time.sleep(600)
"""
    job = start(tmp_path, text, str(tmp_path))
    pids = []
    for rank in range(2):
        wait_for(tmp_path / f"{rank}.pid")
        pids.append(int((tmp_path / f"{rank}.pid").read_text()))
    job.kill()
    job.wait()
    deadline_s = time.monotonic() + LIMIT_S
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_a_job_listens_on_the_loopback_interface_only(tmp_path: Path) -> None:
    arguments = (
        "experiment=smoke logger=disabled logger.every_steps=1 pipeline.size=32 model.num_frames=4 pipeline.decoder=pyav "
        "batch.global_batch=8 schedule.warmup_epochs=0 schedule.epochs=4000 run_id=listening"
    ).split()
    clips = make_clips(tmp_path / "clips")
    job = start_training(World("local", 2), tmp_path / "log", *arguments, f"data.root={clips}", f"outputs={tmp_path}")
    wait_for_record(tmp_path / "listening" / "metrics.jsonl", "train", 180)
    addresses = listening(job.processes())
    job.process.send_signal(signal.SIGTERM)
    ended = job.wait(LIMIT_S)
    assert addresses == LISTENING["local"], addresses
    assert ended.exit_code == 75 and ended.left_running == [], ended.output


def test_what_a_killed_job_still_held_at_the_start_is_removed_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    killed, held = make_temporary_folder("tsm-local-")
    text = """
open(f"{sys.argv[1]}/{rank}", "w").close()
while not os.path.exists(f"{sys.argv[1]}/go"):
    time.sleep(0.01)
"""
    job = start(tmp_path, text, str(tmp_path))
    wait_for(tmp_path / "0")
    assert killed.is_dir()
    os.close(held)
    (tmp_path / "go").touch()
    assert job.wait(LIMIT_S) == 0
    assert list(tmp_path.glob("tsm-local-*")) == []
