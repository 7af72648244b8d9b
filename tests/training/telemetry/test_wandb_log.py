"""Faults of wandb (out of reach, refusing, hanging, dying): training continues, and the log names the fault once."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from distributed.health.stack_dump import descendants
from tests.helpers.processes import command_of
from tests.training.telemetry.test_metrics_log import wandb_records
from training.telemetry.wandb_log import WandbLog

pytestmark = pytest.mark.slow

# A package that stands in for wandb where the fault, and not wandb, is of interest: starting the real one takes seconds.
STAND_IN = """
import os, signal, sys, time
from pathlib import Path

def teardown(): pass

class Settings:
    def __init__(self, **options): pass

class Run:
    def define_metric(self, name, summary):
        pass
    def log(self, numbers, step):
        {log}
        with Path({folder!r}, mode).open("a") as file:
            print(step, file=file)
    def finish(self, exit_code):
        {finish}
        Path({folder!r}, mode + "-exit").write_text(str(exit_code))

def init(**arguments):
    global mode
    mode = arguments["mode"]
    print("noise on stdout", flush=True)
    {init}
    return Run()
"""


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, **faults: str) -> None:
    lines = {"init": "pass", "log": "pass", "finish": "pass"} | faults
    (folder / "packages/wandb").mkdir(parents=True)
    (folder / "packages/wandb/__init__.py").write_text(STAND_IN.format(folder=str(folder), **lines))
    monkeypatch.setenv("PYTHONPATH", str(folder / "packages"))


def logged(folder: Path, online: bool, records: int = 3, limit_s: float = 60.0) -> list[str]:
    """Log some records, of steps 0, 1, ..., and finish with code 7. Returns the warnings."""
    warnings: list[str] = []
    log = WandbLog(online, folder, {"project": "tsm", "id": "r", "name": "r"}, warnings.append)
    for step in range(records):
        log.log({"loss": 1.0}, step)
    log.finish(7, limit_s)
    return warnings


def steps(folder: Path, mode: str) -> list[int]:
    path = folder / mode
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def test_a_server_that_refuses_a_login_leads_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, init="if mode == 'online': raise ValueError('bad key\\nand more')")
    (warning,) = logged(tmp_path, online=True)
    assert "logging online failed: ValueError: bad key. Training continues" in warning
    assert f"wandb sync {tmp_path}/wandb/*run-*" in warning
    assert steps(tmp_path, "offline") == [0, 1, 2]
    assert (tmp_path / "offline-exit").read_text() == "7"


def test_a_process_killed_in_mid_run_leads_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, log="if mode == 'online' and step: os.kill(os.getpid(), signal.SIGKILL)")
    warnings: list[str] = []
    log = WandbLog(True, tmp_path, {}, warnings.append)
    log.log({"loss": 1.0}, 0)
    log.log({"loss": 1.0}, 1)
    deadline_s = time.monotonic() + 60
    while not warnings:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    log.log({"loss": 1.0}, 2)
    log.finish(0, 60)
    (warning,) = warnings
    assert "logging online failed: its process ended with -9" in warning
    assert (steps(tmp_path, "online"), steps(tmp_path, "offline")) == ([0], [2])


@pytest.mark.parametrize("faults", [{"init": "raise OSError('full')"}, {"finish": "raise OSError('full')"}])
def test_offline_errors_leave_the_metrics_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: dict[str, str]
) -> None:
    stand_in(tmp_path, monkeypatch, **faults)
    (warning,) = logged(tmp_path, online=False)
    assert warning == "wandb: logging failed: OSError: full. Training continues; metrics.jsonl has every record"


def test_without_wandb_offline_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch)
    (tmp_path / "packages/wandb/__init__.py").write_text("raise ImportError('not here')")
    (warning,) = logged(tmp_path, online=True)
    assert "cannot import wandb (not here). Training continues; metrics.jsonl has every record" in warning


@pytest.mark.parametrize("faults", [{"finish": "time.sleep(100)"}, {"log": "time.sleep(100)"}])
def test_a_hang_holds_the_job_for_a_limited_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: dict[str, str]
) -> None:
    stand_in(tmp_path, monkeypatch, **faults)
    begun_s = time.monotonic()
    # More than fits into a pipe.
    (warning,) = logged(tmp_path, online=False, records=5_000, limit_s=2)
    assert 2 <= time.monotonic() - begun_s < 60
    assert "not finished after 2 s, which is all that the job waits" in warning
    deadline_s = time.monotonic() + 60
    while any("wandb_process" in command_of(pid) for pid in descendants(os.getpid())):
        assert time.monotonic() < deadline_s, "the process is left running"
        time.sleep(0.05)


def test_a_process_whose_training_was_killed_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch)
    log = WandbLog(False, tmp_path, {}, lambda _: None)
    log.log({"loss": 1.0}, 0)
    deadline_s = time.monotonic() + 60
    while not steps(tmp_path, "offline"):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    assert log._process is not None and log._process.stdin is not None
    # The kernel closes the pipe of a process that is killed.
    os.dup2(os.open(os.devnull, os.O_WRONLY), log._process.stdin.fileno())
    while not (tmp_path / "offline-exit").exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    assert (tmp_path / "offline-exit").read_text() == "1", "wandb shows a failed run"
    log.finish(1, 10)


# --- The real wandb ---------------------------------------------------------------------------------------------------


@contextmanager
def server(kind: str) -> Iterator[int]:
    """Serve HTTP on the loopback interface, or rather not; yields the port."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    port: int = listener.getsockname()[1]

    def answer_500() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 500 x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    if kind == "refuses":
        listener.close()
    elif kind == "500":
        threading.Thread(target=answer_500, daemon=True).start()
    try:
        yield port
    finally:
        if kind != "refuses":
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()


@pytest.mark.parametrize("kind", ["refuses", "never answers", "500"])
def test_wandb_logs_offline_without_its_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    with server(kind) as port:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        (warning,) = logged(tmp_path, online=True, limit_s=240)
    assert "logging online failed: " in warning
    (path,) = tmp_path.glob("wandb/offline-run-*/run-r.wandb")
    records = list(wandb_records(path))
    assert len([record for record in records if record.WhichOneof("record_type") == "history"]) == 3
    assert records[-1].exit.exit_code == 7


def test_wandbs_service_is_killed_in_mid_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    warnings: list[str] = []
    log = WandbLog(False, tmp_path, {"project": "tsm", "id": "r", "name": "r"}, warnings.append)
    deadline_s, step = time.monotonic() + 120, 0
    while not warnings:
        assert time.monotonic() < deadline_s
        log.log({"loss": 1.0}, step)
        step += 1
        time.sleep(0.1)
        if log._process is not None and list(tmp_path.glob("wandb/offline-run-*/run-r.wandb")):
            for pid in descendants(log._process.pid):
                os.kill(pid, signal.SIGKILL)
    log.finish(0, 60)
    assert [warning.split(": ")[:2] for warning in warnings] == [["wandb", "logging failed"]]
