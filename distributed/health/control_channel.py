"""The control channel: each rank's connection to the monitor, apart from the collectives.

A rank that waits in a collective does not learn from it that another rank failed, died or hangs. So a thread of every rank is
connected to the job's monitor (distributed.health.monitor), and ends the process when the monitor says so or is gone itself.
Over the same connection ranks agree on when to stop without a collective (stop_agreement.py).
"""

import ctypes
import os
import select
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from distributed.addresses import own_address
from distributed.backends.base import Backend
from distributed.topology import TopologyError
from runtime.error_report import report_error
from runtime.exit_codes import EXIT_REQUEUE

from . import messages
from .hang_detection import (
    Place,
    heartbeat_interval_s,
    heartbeat_timeout_s,
    own_pause_s,
    phase_timeout_s,
    storage_timeout_s,
)
from .messages import Failure, Message, parse_message
from .monitor_process import MonitorSettings, start_monitor
from .rank_log import RankLog, read_node_log, remove_old_logs
from .stack_dump import descendants, own_stacks, stacks_of, storage_wait
from .stop_agreement import StopAgreement

_CONNECT_TIMEOUT_S = 60.0

# From a failure here until the monitor sends the reason why the job ends.
_VERDICT_TIMEOUT_S = 6.0


class ControlChannel:
    """The control channel of this process. All ranks make theirs together, and close it together.

    `hang_timeout_s`: a job in which no rank makes progress for this long is ended (None: never). Phases that may take long have
    a longer timeout (distributed.health.hang_detection).
    """

    def __init__(self, backend: Backend, hang_timeout_s: float | None = None) -> None:
        topology = backend.topology
        self.rank, self.world_size, self._host = topology.rank, topology.size, topology.host
        self._hang_timeout_s = hang_timeout_s
        self.log = RankLog(topology.rank, topology.host)
        self._is_first_on_node = topology.local_rank == 0
        self._place, self._progress_s = Place(), time.monotonic()
        self._monitor: subprocess.Popen[str] | None = None
        self._verdict: Failure | None = None
        self.before_end: Callable[[], None] = lambda: None
        """Called when another rank's failure ends the job, before this process exits; may take seconds at most."""
        self.at_exit: Callable[[], None] = lambda: None
        """Called last where this process ends without leaving its task: for another rank's failure, or a stop signal."""
        self.run_lock = ""
        """On rank 0: content of the run's lock file while it is this job's."""
        self.check_run_lock: Callable[[], None] = lambda: None
        """On rank 0: ends the job, from any thread, if another job has taken its run over."""
        self._over = threading.Event()
        """The monitor has sent that the job is over, with or without a failure."""
        self._failed_here = False
        self._send_lock = threading.Lock()
        self._stop = StopAgreement(topology.rank, self._send)
        served = None
        if self.rank == 0:
            settings = MonitorSettings(
                own_address(topology), self._host, uuid.uuid4().hex, self.world_size, hang_timeout_s
            )
            self._monitor, port = start_monitor(settings)
            served = asdict(settings) | {"port": port}
        served = backend.broadcast_object(served)
        port = served.pop("port")
        settings = MonitorSettings(**served)
        self._monitor_host = settings.host
        hello = messages.Hello(self.rank, self._host, os.getpid(), settings.token)
        self._connection = _connect((settings.address, port), hello)
        _allow_tracing()
        self._received_s = time.monotonic()
        threading.Thread(target=self._run, name="control", daemon=True).start()

    @property
    def phase(self) -> str:
        """The phase that this rank is in (distributed.health.hang_detection)."""
        return self._place.phase

    @property
    def where(self) -> str:
        return f"rank {self.rank} of {self.world_size} on {self._host}"

    # --- Heartbeats and failures --------------------------------------------------------------------------------------

    def open_log(self, folder: Path) -> None:
        """Write the logs of this rank and of the monitor to the run folder from now on."""
        self.log.open_in(folder, self.run_lock)
        if self._is_first_on_node:
            remove_old_logs(folder.name)
        if self.rank == 0:
            self._send(messages.OpenLog(str(folder), self.run_lock))

    def progress(self, step: int, phase: str) -> None:
        """Record that this rank makes progress, and its place; sends nothing."""
        self._place = Place(step, phase, self._place.progress_count + 1)
        self._progress_s = time.monotonic()

    def _run(self) -> None:
        """Send heartbeats and handle the monitor's messages until the job ends: the body of the thread."""
        buffer, interval_s, next_heartbeat_s = b"", heartbeat_interval_s(self.world_size), 0.0
        while True:
            if time.monotonic() >= next_heartbeat_s:
                place = self._place
                self._send(messages.Heartbeat(place.step, place.phase, place.progress_count))
                next_heartbeat_s = time.monotonic() + interval_s
            waiting_since_s = time.monotonic()
            wait_s = max(0.0, next_heartbeat_s - waiting_since_s)
            readable, _, _ = select.select([self._connection], [], [], wait_s)
            pause_s = own_pause_s(time.monotonic() - waiting_since_s, wait_s)
            self._received_s, self._progress_s = self._received_s + pause_s, self._progress_s + pause_s
            if readable:
                try:
                    part = self._connection.recv(1 << 16)
                except OSError:
                    part = b""
                if not part:
                    self._end_without_monitor("is gone: killed, or its node failed")
                    return
                *lines, buffer = (buffer + part).split(b"\n")
                for line in lines:
                    if self._handle(parse_message(line)):
                        return
            elif self._monitor_is_silent():
                return

    def _handle(self, message: Message | None) -> bool:
        """Act on a message of the monitor; returns whether it was the last one."""
        self._received_s = time.monotonic()
        if isinstance(message, messages.StacksRequest):
            neighbours = {rank: stacks_of(pid) for rank, pid in message.neighbours.items()}
            waits = {rank: storage_wait(pid) for rank, pid in (message.neighbours | {self.rank: os.getpid()}).items()}
            storage_waits = {rank: clause for rank, clause in waits.items() if clause}
            self._send(messages.Stacks(own_stacks(), neighbours, storage_waits))
        elif isinstance(message, messages.JobFailed):
            failure = message.failure()
            if message.send_log and failure.host == self._host and self.log.folder is not None:
                text = read_node_log(self.log.folder.name, failure.rank)
                self._send(messages.LogTail(failure.rank, text))
            self._end(failure)
            return True
        elif isinstance(message, messages.JobDone):
            self._over.set()
            return True
        elif message is not None:
            self._stop.receive(message)
        return False

    def _monitor_is_silent(self) -> bool:
        """End the job if the monitor sends nothing and this rank makes no progress: the monitor's node is lost, most likely,
        and nothing else would detect that."""
        if self._hang_timeout_s is None or self._over.is_set():
            return False
        now_s, limit_s = time.monotonic(), phase_timeout_s(self._place.phase, self._hang_timeout_s)
        silent_s = now_s - self._received_s
        if silent_s <= max(limit_s, heartbeat_timeout_s(self.world_size)) or now_s - self._progress_s <= limit_s:
            return False
        # The monitor may wait for the same disk, where rank 0 is on this node.
        if silent_s <= storage_timeout_s(self._place.phase, self._hang_timeout_s) and storage_wait(os.getpid()):
            return False
        self._end_without_monitor(f"has sent nothing for {silent_s:.0f} s: its node is lost, or its process stopped")
        return True

    def _end_without_monitor(self, reason: str) -> None:
        if not self._over.is_set():
            self._end(Failure(0, self._monitor_host, f": the monitor on its node {reason}", EXIT_REQUEUE))

    def _end(self, failure: Failure) -> None:
        """Log the failure and exit at once: the main thread may be blocked in a collective that never finishes."""
        self._verdict = failure
        if not self._failed_here or failure.rank != self.rank:
            # The cause of an error here may be another rank's death.
            self.log.info(f"error ({self.where}): {failure}")
        if not self._failed_here:
            report_error(self.where, str(failure))
        self._send(messages.LogTail(self.rank, self.log.tail()))
        if self._failed_here:
            # The main thread is exiting by itself.
            self._over.set()
            return
        self.before_end()
        # A child that is stopped or blocked would outlive this process.
        for pid in descendants(os.getpid()):
            if self._monitor is not None and pid == self._monitor.pid:
                continue
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self.at_exit()
        os._exit(failure.exit_code)

    def abort(self, message: str, exit_code: int) -> None:
        """End the job from a thread other than the main one."""
        self.log.info(f"failed: {message}")
        report_error(self.where, message)
        os._exit(self.report_failure(f"failed: {message}", exit_code).exit_code)

    def report_failure(self, message: str, exit_code: int, wait_s: float = _VERDICT_TIMEOUT_S) -> Failure:
        """Send this rank's failure (`failed: ...`), and return the failure that ends the job: another rank's death may be the
        cause. Never raises."""
        own = Failure(self.rank, self._host, message, exit_code)
        self._failed_here = True
        self._send(messages.RankFailed(own.message, exit_code))
        self._over.wait(wait_s)
        return self._verdict or own

    def _send(self, message: Message) -> None:
        # `_run` notices that the monitor is gone.
        with self._send_lock, suppress(OSError):
            self._connection.sendall(message.to_line())

    # --- Agreement on a stop ------------------------------------------------------------------------------------------

    def request_stop(self, reason: str) -> None:
        """Ask all ranks to stop after a common step. Any rank may; the first reason counts."""
        self._stop.request(reason)

    def stop_wanted(self, wanted: str | None) -> bool:
        """Return whether any rank has asked for a stop; asks for one if `wanted`, this rank's reason, is given.

        Ranks learn of it at different moments.
        """
        if wanted is not None:
            self.request_stop(wanted)
        return wanted is not None or self._stop.is_wanted()

    def stop_reason(self) -> str:
        """Return the reason of a stop that a rank has asked for, the same on all ranks."""
        return self._stop.reason()

    def agreed_stop(self, step: int, steps_in_flight: int, wanted: str | None) -> str | None:
        """Return the reason to stop after this step, or None. Call it once per step, after the step's reduction.

        `wanted`: this rank's reason to ask for a stop. `steps_in_flight`: as in StopAgreement.reason_after.
        """
        if wanted is not None:
            self.request_stop(wanted)
        if self.world_size == 1:
            return wanted
        return self._stop.reason_after(step, steps_in_flight)

    def close(self) -> None:
        """Leave after all ranks have finished; other ranks may wait here while rank 0 writes the report."""
        self.progress(self._place.step, "close")
        self._send(messages.RankDone())
        self._over.wait()
        self._connection.close()
        self.log.close()
        if self._monitor is not None:
            self._monitor.wait(_VERDICT_TIMEOUT_S)


def _connect(address: tuple[str, int], hello: messages.Hello) -> socket.socket:
    """Return a connection to the monitor that it has accepted as this rank's.

    A flood of strangers at the start makes the monitor close connections, perhaps before it has read this rank's hello: try again.
    Raises TopologyError if the network does not lead there.
    """
    deadline_s = time.monotonic() + _CONNECT_TIMEOUT_S
    while True:
        try:
            connection = socket.create_connection(address, timeout=_CONNECT_TIMEOUT_S)
        except ConnectionRefusedError:
            # Its node is reached, but the monitor has ended.
            raise
        except OSError as error:
            raise TopologyError(
                f"rank {hello.rank} on {hello.host} cannot reach the monitor, on rank 0's node, at {address[0]} port {address[1]}: "
                f"{error}. Fix: TSM_NETWORK_INTERFACE=NAME of the interface between the nodes, or open ports between them"
            ) from None
        with suppress(OSError):
            connection.sendall(hello.to_line() + messages.Heartbeat(0, "start", 0).to_line())
            # The answer to the heartbeat, which the control channel's thread reads.
            if connection.recv(1, socket.MSG_PEEK):
                return connection
        if time.monotonic() > deadline_s:
            return connection
        connection.close()
        time.sleep(0.1)


def _allow_tracing() -> None:
    """Allow py-spy to attach to this process where the kernel allows only parents to (Yama's ptrace_scope)."""
    pr_set_ptracer, pr_set_ptracer_any = 0x59616D61, ctypes.c_ulong(-1)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(pr_set_ptracer, pr_set_ptracer_any, 0, 0, 0)
