"""Log to wandb through a process apart from training, so that wandb can fail, hang or be killed without effect on the job."""

import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distributed.health.stack_dump import descendants
from runtime.checkout import CHECKOUT
from training.config.schema import Config
from training.runs.run_folder import git

from .charts import SUMMARIES

FINISH_LIMIT_S = 45.0
"""Time that a finished job waits for wandb."""

STOP_LIMIT_S = 5.0
"""Time that a job which fails or stops early waits for wandb: its launcher may kill it soon."""

INIT_TIMEOUT_S = 30.0
"""Time that wandb has to reach its server, unless WANDB_INIT_TIMEOUT is set. Training does not wait for it."""

# Further time to start wandb's processes, which compete with decoding for cores.
_START_S = 30.0

# Records that may wait for the process.
_QUEUE_SIZE = 10_000

_POLL_S = 0.5

_ONLY_METRICS = "Training continues; metrics.jsonl has every record"

_Process = subprocess.Popen[bytes]


@dataclass(frozen=True)
class _Failed:
    reason: str
    may_work_offline: bool = True


class WandbLog:
    """The wandb run of a training run. No method raises; `log` never waits, and `finish` waits for a limited time.

    A thread hands the records to wandb's process. If online logging fails, a new process logs the rest offline. If offline
    logging fails too, only metrics.jsonl has the records. Each failure is logged once, through `warn`, from any thread.
    """

    def __init__(self, online: bool, folder: Path, arguments: dict[str, Any], warn: Callable[[str], None]) -> None:
        """`arguments`: further ones of wandb.init, as JSON values."""
        self._modes = ("online", "offline") if online else ("offline",)
        self._folder, self._arguments, self._warn = folder, arguments, warn
        self._records: queue.Queue[dict[str, Any]] = queue.Queue(_QUEUE_SIZE)
        # Taken from the queue and not sent yet.
        self._held: dict[str, Any] | None = None
        # Half of the time that a run has left when it ends is for logging offline.
        self._ready_by_s: float | None = None
        self._gave_up = False
        self._process: _Process | None = None
        self._thread = threading.Thread(target=self._run, name="wandb", daemon=True)
        self._thread.start()

    def log(self, numbers: dict[str, int | float], step: int) -> None:
        """Queue a record."""
        self._put({"numbers": numbers, "step": step})

    def finish(self, exit_code: int, limit_s: float) -> None:
        """Give wandb up to `limit_s` to write and send everything, then kill its process."""
        self._ready_by_s = time.monotonic() + limit_s / 2
        self._put({"exit_code": exit_code})
        self._thread.join(limit_s)
        if self._thread.is_alive():
            self._give_up(
                f"not finished after {limit_s:.0f} s, which is all that the job waits. {self._how_to_upload()}"
            )
            if self._process is not None:
                _kill(self._process)

    def _put(self, record: dict[str, Any]) -> None:
        try:
            self._records.put_nowait(record)
        except queue.Full:
            self._give_up(f"its process has stopped reading, with {_QUEUE_SIZE} records waiting. {_ONLY_METRICS}")

    def _give_up(self, why: str) -> None:
        if not self._gave_up:
            self._gave_up = True
            self._warn(f"wandb: {why}")

    def _how_to_upload(self) -> str:
        return f"Upload later: wandb sync {self._folder}/wandb/*run-*"

    # --- The thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Log with the first mode that works, until the run is over."""
        for mode in self._modes:
            failed = self._serve(mode)
            if failed is None or self._gave_up:
                return
            if mode == "offline" or not failed.may_work_offline:
                self._give_up(f"logging failed: {failed.reason}. {_ONLY_METRICS}")
                return
            self._warn(
                f"wandb: logging online failed: {failed.reason}. Training continues, wandb logs offline. {self._how_to_upload()}"
            )

    def _serve(self, mode: str) -> _Failed | None:
        """Start a process, and hand it records until the run is over. Returns why it failed, if it did."""
        try:
            self._process = process = self._start(mode)
        except OSError as error:
            return _Failed(f"cannot start its process ({error.strerror})", may_work_offline=False)
        with process:
            try:
                return self._wait_until_ready(process) or self._hand_over(process)
            except OSError:
                # The process ended; it may have said why.
                return _failure(process, _read_reply(process, _POLL_S))
            finally:
                _kill(process)

    def _start(self, mode: str) -> _Process:
        process = subprocess.Popen(
            [sys.executable, "-m", "training.telemetry.wandb_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd=CHECKOUT,
            env={"WANDB_INIT_TIMEOUT": str(INIT_TIMEOUT_S)} | os.environ,
            start_new_session=True,
        )
        resume = "allow" if mode == "online" else None
        init = self._arguments | {"dir": str(self._folder), "mode": mode, "resume": resume}
        # If the process has ended already, its missing reply says so.
        with suppress(OSError):
            _send(process, {"argv": sys.argv, "init": init, "summaries": SUMMARIES})
        return process

    def _wait_until_ready(self, process: _Process) -> _Failed | None:
        begun_s = time.monotonic()
        while (reply := _read_reply(process, _POLL_S)) is None:
            now_s = time.monotonic()
            waited_s = now_s - begun_s
            if waited_s > _init_timeout_s() + _START_S or (self._ready_by_s is not None and now_s > self._ready_by_s):
                return _Failed(f"no answer within {waited_s:.0f} s")
            if self._gave_up:
                return _Failed("given up")
        return None if "ready" in reply else _failure(process, reply)

    def _hand_over(self, process: _Process) -> _Failed | None:
        while not self._gave_up:
            if self._held is None:
                try:
                    self._held = self._records.get(timeout=_POLL_S)
                except queue.Empty:
                    if process.poll() is None:
                        continue
                    return _failure(process, _read_reply(process, _POLL_S))
            _send(process, self._held)
            is_last, self._held = "exit_code" in self._held, None
            if is_last:
                reply = _read_reply(process, None)
                # All records are in wandb's files, or lost: an offline run would be empty.
                return None if reply is not None and "finished" in reply else _failure(process, reply, False)
        return None


def _init_timeout_s() -> float:
    try:
        return float(os.environ["WANDB_INIT_TIMEOUT"])
    except (KeyError, ValueError):
        return INIT_TIMEOUT_S


def _send(process: _Process, message: dict[str, Any]) -> None:
    assert process.stdin is not None
    rest = memoryview(json.dumps(message).encode() + b"\n")
    while rest:
        rest = rest[os.write(process.stdin.fileno(), rest) :]


def _read_reply(process: _Process, timeout_s: float | None) -> dict[str, Any] | None:
    """Return the next reply; {} if the process has ended; None if there is none within the time."""
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], timeout_s)[0]:
        return None
    line = process.stdout.readline()
    reply: dict[str, Any] = json.loads(line) if line.endswith(b"\n") else {}
    return reply


def _failure(process: _Process, reply: dict[str, Any] | None, may_work_offline: bool = True) -> _Failed:
    if reply and "failed" in reply:
        return _Failed(reply["failed"], may_work_offline and reply["installed"])
    with suppress(subprocess.TimeoutExpired):
        process.wait(_POLL_S)
    return _Failed(f"its process ended with {process.returncode}", may_work_offline)


def _kill(process: _Process) -> None:
    """Kill the process and wandb's service processes, which have sessions of their own."""
    for pid in [*descendants(process.pid), process.pid] if process.poll() is None else []:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def wandb_arguments(config: Config, run_id: str) -> dict[str, Any]:
    """Return the run's name and what runs can be filtered and grouped by in wandb, as arguments of wandb.init."""
    return {
        "project": config.logger.project,
        "id": run_id,
        "name": run_id,
        # wandb joins nested keys with dots itself, and wants none in the names that it is given.
        "config": asdict(config) | {"commit": git("rev-parse", "HEAD")},
        # A resumed run may have another configuration, such as another number of workers.
        "allow_val_change": True,
        "group": config.logger.group or config.name,
        "job_type": "train",
        "tags": [
            tag for tag in dict.fromkeys([config.model.backbone, config.data.name[:64], *config.logger.tags]) if tag
        ],
    }
