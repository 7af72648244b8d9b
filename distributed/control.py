"""The control channel: a small key-value store beside the collectives, by which ranks learn of each other's fate.

A rank that waits in a collective hears nothing there of a rank that failed. Here it does: every rank has a thread that
leaves a sign of life and looks for a failure, and ends the process when one was reported or the store is gone.
"""

import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta

from torch.distributed import TCPStore

from .backend import Backend

_BEAT_S = 0.5
_STORE_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Failure:
    """Why a rank ended early."""

    rank: int
    host: str
    message: str
    exit_code: int

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} failed: {self.message}"


class ControlChannel:
    """One for each process; rank 0 holds the store. All ranks make it together, and close it together."""

    def __init__(self, backend: Backend) -> None:
        self._rank, self._size = backend.topology.rank, backend.topology.size
        self._host = backend.topology.host
        self._step, self._phase = 0, "start"
        self._closing = threading.Event()
        self._store: TCPStore | None = None
        self._thread: threading.Thread | None = None
        if self._size == 1:
            return
        one_node = backend.topology.local_size == self._size
        served = self._serve("127.0.0.1" if one_node else _address()) if self._rank == 0 else None
        address, port = backend.broadcast_object(served)
        if self._store is None:
            self._store = self._connect(address, port)
        # A client of its own for the thread: a connection serves one request at a time.
        self._thread = threading.Thread(
            target=self._watch, args=(self._connect(address, port),), name="control", daemon=True
        )
        self._thread.start()

    def _serve(self, address: str) -> tuple[str, int]:
        """Hold the store; a socket of our own, because torch would listen on every interface."""
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
        return address, port

    @staticmethod
    def _connect(address: str, port: int) -> TCPStore:
        return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_STORE_TIMEOUT_S))

    def progress(self, step: int, phase: str) -> None:
        """What the next sign of life says; costs nothing."""
        self._step, self._phase = step, phase

    def _watch(self, store: TCPStore) -> None:
        while not self._closing.wait(_BEAT_S):
            try:
                beat = {"step": self._step, "phase": self._phase, "time_s": time.time()}
                store.set(f"beat/{self._rank}", json.dumps(beat))
                if store.check(["failure"]):
                    self._end_process(Failure(**json.loads(store.get("failure"))), store)
                    return
            except RuntimeError:  # torch raises it for a connection that ended
                if not self._closing.is_set():
                    self._end_process(
                        Failure(0, "its host", "it is gone: the control channel closed without a word", 1)
                    )
                return

    def _end_process(self, failure: Failure, store: TCPStore | None = None) -> None:
        """Say why and leave at once: the main thread may be held in a collective that nothing will ever finish."""
        if failure.rank == self._rank:
            return  # this rank's main thread is on its way out by itself
        print(f"error (rank {self._rank} of {self._size} on {self._host}): {failure}", file=sys.stderr, flush=True)
        if store is not None:
            with suppress(RuntimeError):  # the store may be gone with its rank
                store.set(
                    f"heard/{self._rank}", ""
                )  # the failed rank waits for it: launchers kill the others when it ends
        os._exit(failure.exit_code)

    def report_failure(self, message: str, exit_code: int) -> None:
        """Tell every rank why this one ends, and give them a moment to say so themselves. Never raises."""
        failure = Failure(self._rank, self._host, message, exit_code)
        if self._store is None:
            return
        try:
            if self._store.compare_set("failure", "", json.dumps(asdict(failure))).decode() != json.dumps(
                asdict(failure)
            ):
                return  # another rank was first
            others = [f"heard/{rank}" for rank in range(self._size) if rank != self._rank]
            self._store.wait(others, timedelta(seconds=6 * _BEAT_S))
        except RuntimeError:
            pass  # the store or some rank is gone already: nothing more can be told

    def request_stop(self, reason: str) -> None:
        """Ask for a stop in good order at a step that all ranks agree on; any rank may, from its main thread."""
        if self._store is not None:
            self._store.set("stop/wanted", reason)

    def agreed_stop(self, step: int, steps_in_flight: int, wanted: str | None) -> str | None:
        """Call it once a step, behind the step's reduction: the reason to stop here, or None.

        Rank 0 sets the last step, `steps_in_flight` ahead: no rank can have finished a later one, since each needs rank 0's
        gradients, and hosts run at most that far ahead of their devices.
        """
        if self._store is None:
            return wanted
        if wanted is not None and not self._store.check(["stop/wanted"]):
            self.request_stop(wanted)
        if self._rank == 0 and not self._store.check(["stop/last"]) and self._store.check(["stop/wanted"]):
            self._store.set("stop/last", str(step + 1 + steps_in_flight))
        if self._store.check(["stop/last"]) and step >= int(self._store.get("stop/last")):
            return self._store.get("stop/wanted").decode()
        return None

    def barrier(self, name: str, timeout_s: float) -> None:
        """Wait for all ranks; raises TimeoutError that names those who did not come. `name` must be new each time."""
        if self._store is None:
            return
        self._store.set(f"barrier/{name}/{self._rank}", "")
        everyone = {rank: f"barrier/{name}/{rank}" for rank in range(self._size)}
        try:
            self._store.wait(list(everyone.values()), timedelta(seconds=timeout_s))
        except RuntimeError:
            absent = [rank for rank, key in everyone.items() if not self._store.check([key])]
            raise TimeoutError(f"after {timeout_s:.0f} s at {name!r}, these ranks are missing: {absent}") from None

    def close(self) -> None:
        """Stop watching; rank 0's store must outlive the others' threads, so all ranks come here first."""
        if self._store is not None:
            self._closing.set()
            assert self._thread is not None
            self._thread.join(_STORE_TIMEOUT_S)
            self.barrier("close", _STORE_TIMEOUT_S)


def _address() -> str:
    """Where other nodes reach this process: what the host's own name leads to."""
    return socket.gethostbyname(socket.gethostname())
