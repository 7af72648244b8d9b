"""The control channel: how ranks learn of each other's fate, beside the collectives.

A rank that waits in a collective hears nothing there of a rank that failed, died or hangs. Here it does: a thread of every rank
talks with the job's monitor (distributed.health.monitor), and ends the process when that says so or is gone itself. A small
key-value store on rank 0 lets ranks agree without a collective.
"""

import ctypes
import json
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
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from distributed.backends.base import Backend
from runtime.exit_codes import EXIT_REQUEUE

from .hang_detection import Place, patience_s
from .monitor import Failure, Settings, beat_s, silent_s, start_monitor
from .rank_log import Journal, node_log, read_tail
from .stack_dump import descendants, own_stacks, stacks_of

_CONNECT_S = 60.0
_STORE_TIMEOUT_S = 10.0
_VERDICT_S = 6.0  # between a failure here and the monitor's word on why the job ends


class ControlChannel:
    """One for each process. All ranks make it together, and close it together.

    `hang_s`: a job in which no rank makes progress for so long is ended (None: never); phases that rightly take long have
    more time (distributed.health.hang_detection).
    """

    def __init__(self, backend: Backend, hang_s: float | None = None) -> None:
        topology = backend.topology
        self._rank, self._size, self._host = topology.rank, topology.size, topology.host
        self._hang_s = hang_s
        self.journal = Journal(topology.rank, topology.host)
        self._place, self._marked_s = Place(), time.monotonic()
        self._store: TCPStore | None = None
        self._monitor: subprocess.Popen[str] | None = None
        self._verdict: Failure | None = None
        self.before_end: Callable[[], None] = lambda: None
        """What this rank still has to do when another one's fault ends the job: seconds at most."""
        self._over = threading.Event()
        """The monitor has said that the job is over, one way or the other."""
        self._failed_here = False
        self._sending = threading.Lock()
        served = None
        if self._rank == 0:
            address = "127.0.0.1" if topology.local_size == self._size else _address()
            settings = Settings(address, self._host, uuid.uuid4().hex, self._size, hang_s)
            self._monitor, port = start_monitor(settings)
            served = (settings, port, self._serve_store(address) if self._size > 1 else 0)
        settings, port, store_port = backend.broadcast_object(served)
        if self._rank != 0:
            timeout = timedelta(seconds=_STORE_TIMEOUT_S)
            self._store = TCPStore(settings.address, store_port, is_master=False, timeout=timeout)
        self._monitor_host = settings.host
        self._connection = socket.create_connection((settings.address, port), timeout=_CONNECT_S)
        _let_be_traced()
        self._heard_s = time.monotonic()
        self._say({"hello": [self._rank, self._host, os.getpid()], "token": settings.token})
        threading.Thread(target=self._attend, name="control", daemon=True).start()

    def _serve_store(self, address: str) -> int:
        """Hold the store; on a socket of our own, because torch would listen on every interface."""
        listener = socket.create_server((address, 0), backlog=4096)
        port: int = listener.getsockname()[1]
        self._store = TCPStore(
            address,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=_STORE_TIMEOUT_S),
            master_listen_fd=listener.detach(),
        )
        return port

    # ---------------------------------------------------------------------------------------------- signs of life and of death

    def open_log(self, folder: Path) -> None:
        """The run folder is known: this rank's log and the monitor's go on there."""
        self.journal.open_in(folder)
        if self._rank == 0:
            self._say({"folder": str(folder)})

    def progress(self, step: int, phase: str) -> None:
        """Note that this rank gets on, and where it is; costs nothing."""
        self._place, self._marked_s = Place(step, phase, self._place.marks + 1), time.monotonic()

    def _attend(self) -> None:
        """The thread: leaves signs of life and does what the monitor asks, until the end."""
        buffer, pause_s, next_beat_s = b"", beat_s(self._size), 0.0
        while True:
            if time.monotonic() >= next_beat_s:
                place = self._place
                self._say({"place": [place.step, place.phase, place.marks]})
                next_beat_s = time.monotonic() + pause_s
            readable, _, _ = select.select([self._connection], [], [], max(0.0, next_beat_s - time.monotonic()))
            if readable:
                try:
                    part = self._connection.recv(1 << 16)
                except OSError:
                    part = b""
                if not part:
                    self._lost_monitor("is gone: killed, or its node failed")
                    return
                *lines, buffer = (buffer + part).split(b"\n")
                for line in lines:
                    if self._obey(json.loads(line)):
                        return
            elif self._monitor_is_silent():
                return

    def _obey(self, message: dict[str, Any]) -> bool:
        """Do what the monitor says; True when that was the last."""
        self._heard_s = time.monotonic()
        if "stacks" in message:
            neighbours = {rank: stacks_of(pid) for rank, pid in message["stacks"].items()}
            self._say({"stacks": own_stacks(), "neighbours": neighbours})
        if "end" in message:
            failure = Failure(**message["end"])
            if message["mute"] and failure.host == self._host and self.journal.folder is not None:
                lost = node_log(self.journal.folder.name, failure.rank)
                self._say({"log": read_tail(lost), "of": failure.rank})
            self._end(failure)
            return True
        if "done" in message:
            self._over.set()
        return "done" in message

    def _monitor_is_silent(self) -> bool:
        """The monitor says nothing and nothing moves here: its node is lost, which nothing else would tell."""
        if self._hang_s is None or self._over.is_set():
            return False
        now_s, limit_s = time.monotonic(), patience_s(self._place.phase, self._hang_s)
        if now_s - self._heard_s <= max(limit_s, silent_s(self._size)) or now_s - self._marked_s <= limit_s:
            return False
        self._lost_monitor(
            f"has said nothing for {now_s - self._heard_s:.0f} s: its node is lost, or its process stopped"
        )
        return True

    def _lost_monitor(self, what: str) -> None:
        if not self._over.is_set():
            self._end(Failure(0, self._monitor_host, f": the monitor beside it {what}", EXIT_REQUEUE))

    def _end(self, failure: Failure) -> None:
        """Say why and leave at once: the main thread may be held in a collective that nothing will ever finish."""
        self._verdict = failure
        if not self._failed_here:
            self.journal.warn(f"error (rank {self._rank} of {self._size} on {self._host}): {failure}")
        self._say({"log": self.journal.tail(), "of": self._rank})
        if self._failed_here:
            self._over.set()  # the main thread is on its way out by itself
            return
        self.before_end()
        for pid in descendants(os.getpid()):  # a worker that is stopped or blocked would stay
            if self._monitor is not None and pid == self._monitor.pid:
                continue
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        os._exit(failure.exit_code)

    def report_failure(self, message: str, exit_code: int) -> Failure:
        """Tell every rank why this one ends, and learn why the job does: another's death may be behind it. Never raises."""
        own = Failure(self._rank, self._host, f"failed: {message}", exit_code)
        self._failed_here = True
        self._say({"failure": {"message": own.message, "exit_code": exit_code}})
        self._over.wait(_VERDICT_S)
        return self._verdict or own

    def _say(self, message: dict[str, Any]) -> None:
        with self._sending, suppress(OSError):  # that the monitor is gone becomes known where it is heard
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    # ------------------------------------------------------------------------------------------------------------- agreements

    def request_stop(self, reason: str) -> None:
        """Ask for a stop in good order; any rank may, from its main thread. The first to ask says why."""
        if self._store is not None:
            self._store.compare_set("stop/wanted", "", reason)

    def stop_wanted(self, wanted: str | None) -> bool:
        """Whether any rank has asked for a stop; this one does, if it has a reason. Ranks hear of it at different moments."""
        if self._store is None:
            return wanted is not None
        if wanted is not None:
            self.request_stop(wanted)
        return wanted is not None or self._store.check(["stop/wanted"])

    def stop_reason(self, wanted: str | None) -> str:
        """Why the job stops, the same on all ranks, once they have agreed that it does (`wanted`: this rank's own reason)."""
        if self._store is None:
            assert wanted is not None
            return wanted
        return self._store.get("stop/wanted").decode()

    def agreed_stop(self, step: int, steps_in_flight: int, wanted: str | None) -> str | None:
        """Call it once a step, behind the step's reduction: the reason to stop here, or None.

        Rank 0 sets the last step, `steps_in_flight` ahead: no rank can have finished a later one, since each needs rank 0's
        gradients, and hosts run at most that far ahead of their devices.
        """
        if self._store is None:
            return wanted
        if wanted is not None:
            self.request_stop(wanted)
        if self._rank == 0 and not self._store.check(["stop/last"]) and self._store.check(["stop/wanted"]):
            self._store.set("stop/last", str(step + 1 + steps_in_flight))
        if self._store.check(["stop/last"]) and step >= int(self._store.get("stop/last")):
            return self.stop_reason(wanted)
        return None

    def close(self) -> None:
        """Leave in good order, when all ranks have come here; rank 0, which has a report to write, may be late."""
        self.progress(self._place.step, "close")
        self._say({"done": True})
        self._over.wait()
        self._connection.close()
        self.journal.close()
        if self._monitor is not None:
            self._monitor.wait(_VERDICT_S)


def _let_be_traced() -> None:
    """Let py-spy look at this process where the kernel lets only parents do so (Yama)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)


def _address() -> str:
    """Where other nodes reach this process: what the host's own name leads to."""
    return socket.gethostbyname(socket.gethostname())
