"""The witness of a job: it hears every rank, notices who died or hangs, ends the job for all, and writes down why.

Every rank holds a connection to it. The kernel closes the connection of a process that is killed, so a death is known at
once, on any backend and under any launcher; a process that is stopped, or a node that is gone, falls silent instead.

It is a process of its own, beside rank 0 but in a session of its own: it sees the end of a job that its launcher kills within a
second (mpirun), it judges rank 0 like any other rank, and no thread that holds Python's lock holds it up. It imports no torch.
Messages are lines of JSON. The control channel of rank 0 starts `python -m distributed.health.monitor`.
"""

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from runtime.checkout import CHECKOUT
from runtime.exit_codes import EXIT_FAILURE, EXIT_REQUEUE

from .hang_detection import Place, Seen, patience_s, stuck_ranks
from .rank_log import Journal, node_log, read_tail
from .stack_dump import stacks_of

_TICK_S = 0.25
_ECHO_S = 1.0  # an error of one rank may be the echo of another's death, which becomes known a moment later
_STACKS_S = 45.0  # for all ranks to say where they are; py-spy may take 20
_FAREWELL_S = 3.0  # for all ranks to hear that it is over
_OBEY_S = 15.0  # for the ranks beside it to end once they have been told to
_SEND_S = 1.0


def beat_s(size: int) -> float:
    """Seconds between two signs of life of a rank: at most some 500 messages a second reach rank 0."""
    return max(0.5, size / 500)


def silent_s(size: int) -> float:
    """How long a rank may say nothing, on a busy node, before it counts as silent."""
    return 5.0 + 4 * beat_s(size)


@dataclass(frozen=True)
class Failure:
    """Why the job ends before its time: `rank R on HOST MESSAGE`."""

    rank: int
    host: str
    message: str
    exit_code: int

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} {self.message}"


@dataclass
class _Peer:
    """A rank's connection, and what it said through it."""

    connection: socket.socket
    rank: int = -1
    host: str = "?"
    pid: int = 0
    buffer: bytes = b""
    seen: Seen = field(default_factory=lambda: Seen(Place(), time.monotonic(), time.monotonic()))
    leaving: bool = False
    """It said that it is done, or that it failed: the end of its connection is no surprise then."""
    stacks: str | None = None


@dataclass(frozen=True)
class Settings:
    """What a monitor is started with. Only ranks that know `token` are heard."""

    address: str
    host: str
    token: str
    size: int
    hang_s: float | None


def start_monitor(settings: Settings) -> tuple["subprocess.Popen[str]", int]:
    """Start it as a process that outlives this one; and its port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "distributed.health.monitor"],
        stdin=subprocess.PIPE,  # other users of the node can read a command line, and the token is for our ranks alone
        stdout=subprocess.PIPE,
        text=True,
        cwd=CHECKOUT,
        start_new_session=True,
    )
    assert process.stdin is not None and process.stdout is not None
    with process.stdin, process.stdout:
        process.stdin.write(json.dumps(asdict(settings)) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the monitor did not start: it ended with {process.wait()}")
    return process, int(line)


class Monitor:
    """One for a job; `run` returns when the job is over."""

    def __init__(self, settings: Settings) -> None:
        self._listener = socket.create_server((settings.address, 0), backlog=4096)
        self.port: int = self._listener.getsockname()[1]
        self._host, self._token, self._size = settings.host, settings.token, settings.size
        self._hang_s = settings.hang_s
        self._journal = Journal("monitor", settings.host)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._peers: dict[int, _Peer] = {}
        self._came = 0
        self._started_s = time.monotonic()
        self._failures: list[tuple[float, Failure]] = []
        """With the time from which each counts."""
        self._verdict: Failure | None = None
        self._all_done = False
        self._neighbours: dict[int, str] = {}
        """What was found out about silent ranks by others on their nodes."""

    def run(self) -> None:
        parent = os.getppid()
        while self._verdict is None and not self._all_done:
            self._hear(_TICK_S)
            self._judge_failures()
            if self._hang_s is not None and self._verdict is None:
                if self._came < self._size:
                    self._judge_arrival(self._hang_s)
                elif len(self._peers) == self._size:
                    self._judge_progress(self._hang_s)
            if not self._peers and os.getppid() != parent:
                return  # rank 0 ended before any rank came
        told_s = time.monotonic()
        while self._peers and time.monotonic() < told_s + _FAREWELL_S:
            self._hear(0.05)
        if self._verdict is not None:
            self._end_the_deaf(told_s + _OBEY_S)

    def _end_the_deaf(self, deadline_s: float) -> None:
        """A rank that is stopped, or held in a library that holds Python's lock, does not hear that it is to end; and where no rank
        ends, no launcher ends the job. Rank 0 is always beside the monitor."""

        def beside() -> list[_Peer]:
            return [peer for peer in self._peers.values() if peer.host == self._host]

        while beside() and time.monotonic() < deadline_s:
            self._hear(0.05)
        for peer in beside():
            self._journal.warn(f"{self._name(peer.rank)} does not end by itself: killed")
            with suppress(OSError):
                os.kill(peer.pid, signal.SIGKILL)

    # ------------------------------------------------------------------------------------------------------------- hearing

    def _hear(self, wait_s: float) -> None:
        for key, _ in self._selector.select(wait_s):
            if key.fileobj is self._listener:
                connection, _ = self._listener.accept()
                connection.settimeout(_SEND_S)
                self._selector.register(connection, selectors.EVENT_READ, _Peer(connection))
            else:
                self._read(key.data)

    def _read(self, peer: _Peer) -> None:
        try:
            part = peer.connection.recv(1 << 16)
        except OSError:
            part = b""
        *lines, peer.buffer = (peer.buffer + part).split(b"\n")
        try:
            for line in lines:
                self._take(peer, json.loads(line))
        except (ValueError, KeyError, TypeError, PermissionError):
            part = b""  # no rank of ours says such things
        if not part:
            self._lost(peer)

    def _take(self, peer: _Peer, message: dict[str, Any]) -> None:
        now_s = time.monotonic()
        if "hello" in message:
            if message["token"] != self._token:
                raise PermissionError
            peer.rank, peer.host, peer.pid = message["hello"]
            self._peers[peer.rank] = peer
            self._came += 1
        elif peer.rank < 0:
            raise PermissionError
        if "folder" in message:
            self._journal.open_in(Path(message["folder"]))
        if "place" in message:
            place = Place(*message["place"])
            moved = place.marks != peer.seen.place.marks
            peer.seen = Seen(place, now_s if moved else peer.seen.marked_s, now_s)
            _send(peer, {"tick": True})
        if "failure" in message:
            peer.leaving = True
            self._failures.append((now_s + _ECHO_S, Failure(peer.rank, peer.host, **message["failure"])))
        if "stacks" in message:
            peer.stacks = message["stacks"]
            self._neighbours |= {int(rank): text for rank, text in message["neighbours"].items()}
        if "log" in message:
            self._keep_log(int(message["of"]), message["log"])
        if "done" in message:
            peer.leaving = True
            self._all_done = len(self._peers) == self._size and all(each.leaving for each in self._peers.values())
            if self._all_done:
                self._tell_all({"done": True})

    def _lost(self, peer: _Peer) -> None:
        self._selector.unregister(peer.connection)
        peer.connection.close()
        if self._peers.pop(peer.rank, None) is None or peer.leaving or self._verdict or self._all_done:
            return
        message = f"is gone: its process was killed or crashed, or its node failed, at {peer.seen.place}"
        self._failures.append((time.monotonic(), Failure(peer.rank, peer.host, message, EXIT_REQUEUE)))

    def _tell_all(self, message: dict[str, Any]) -> None:
        for peer in self._peers.values():
            _send(peer, message)

    # ------------------------------------------------------------------------------------------------------------- judging

    def _judge_failures(self) -> None:
        if not self._failures:
            return
        due_s, failure = min(self._failures, key=lambda entry: entry[0])
        if due_s > time.monotonic():
            return
        silent = [rank for rank in sorted(self._peers) if self._is_silent(rank)]
        if failure.exit_code == EXIT_FAILURE and silent:  # a collective that gave up waiting for it, most likely
            first = self._peers[silent[0]]
            what = f"stands at {first.seen.place}{self._silence(silent[0])}; then {failure}"
            failure = Failure(first.rank, first.host, what, EXIT_REQUEUE)
        self._end(failure)

    def _judge_arrival(self, hang_s: float) -> None:
        limit_s = patience_s("start", hang_s)
        if time.monotonic() - self._started_s > limit_s:
            absent = [rank for rank in range(self._size) if rank not in self._peers]
            self._end(
                Failure(
                    absent[0], "some node", f"has not come in {limit_s:.0f} s; absent: ranks {absent}", EXIT_REQUEUE
                )
            )

    def _judge_progress(self, hang_s: float) -> None:
        stuck = self._stuck(hang_s)
        if not stuck:
            return
        stood_s = time.monotonic() - max(peer.seen.marked_s for peer in self._peers.values())
        named = "; ".join(
            f"{self._name(rank)} at {self._peers[rank].seen.place}{self._silence(rank)}" for rank in stuck[:8]
        )
        self._journal.warn(
            f"no rank made progress for {stood_s:.0f} s (distributed.hang_timeout_s={hang_s:g}): waiting for {named}"
            f"{f', and {len(stuck) - 8} more' if len(stuck) > 8 else ''}. Collecting the stacks of all ranks"
        )
        where = self._collect_stacks(stuck)
        if self._failures:
            return  # somebody died meanwhile, which is the better reason
        if not self._stuck(hang_s):
            self._journal.warn(f"the job moves again; stacks: {where}")
            return
        first, *others = stuck
        too = f", and ranks {others}" if others else ""
        message = f"hangs at {self._peers[first].seen.place}{self._silence(first)}{too}; stacks of all ranks: {where}"
        self._end(Failure(first, self._peers[first].host, message, EXIT_REQUEUE))

    def _stuck(self, hang_s: float) -> list[int]:
        seen = {rank: peer.seen for rank, peer in self._peers.items()}
        return stuck_ranks(seen, time.monotonic(), hang_s, silent_s(self._size))

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._peers[rank].host}"

    def _is_silent(self, rank: int) -> bool:
        return time.monotonic() - self._peers[rank].seen.heard_s > silent_s(self._size)

    def _silence(self, rank: int) -> str:
        if not self._is_silent(rank):
            return ""
        return f", silent for {time.monotonic() - self._peers[rank].seen.heard_s:.0f} s"

    def _collect_stacks(self, stuck: list[int]) -> str:
        """Ask every rank where it is, and a neighbour about each silent one; returns where the answers were written."""
        silent = [rank for rank in self._peers if self._is_silent(rank)]
        asked = [rank for rank in sorted(self._peers) if rank not in silent]
        for rank in asked:
            peer = self._peers[rank]
            peer.stacks = None
            first_on_node = rank == min(other for other in asked if self._peers[other].host == peer.host)
            about = [self._peers[other] for other in silent if self._peers[other].host == peer.host]
            _send(
                peer,
                {"stacks": {other.rank: other.pid for other in about if first_on_node and self._host != peer.host}},
            )
        self._neighbours |= {
            rank: stacks_of(self._peers[rank].pid) for rank in silent if self._peers[rank].host == self._host
        }
        deadline_s = time.monotonic() + _STACKS_S
        while time.monotonic() < deadline_s and any(
            self._peers[rank].stacks is None for rank in asked if rank in self._peers
        ):
            self._hear(_TICK_S)
        parts = []
        for rank in [*stuck, *(rank for rank in sorted(self._peers) if rank not in stuck)]:
            if rank in self._peers:
                text = self._peers[rank].stacks or self._neighbours.get(rank) or "(no answer)"
                parts.append(f"==== {self._name(rank)}, {self._peers[rank].seen.place}{self._silence(rank)}\n{text}\n")
        self._journal.warn(parts[0])
        return self._journal.keep("stacks.txt", "\n".join(parts))

    def _keep_log(self, rank: int, text: str) -> None:
        if rank != 0 and text:  # rank 0's is in the run folder as it is
            self._journal.keep(f"rank-{rank:05d}.log", text)

    def _end(self, failure: Failure) -> None:
        self._verdict = failure
        self._journal.warn(f"the job ends: {failure}")
        self._journal.outcome(failure.exit_code, str(failure))
        mute = failure.rank not in self._peers or self._is_silent(failure.rank)
        if mute and failure.host == self._host and self._journal.folder is not None:
            self._keep_log(failure.rank, read_tail(node_log(self._journal.folder.name, failure.rank)))
        self._tell_all({"end": asdict(failure), "mute": mute and failure.host != self._host})


def _send(peer: _Peer, message: dict[str, Any]) -> None:
    with suppress(OSError):  # a connection that ended is noticed where it is read
        peer.connection.sendall(json.dumps(message).encode() + b"\n")


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # Slurm sends them to all that it started
        signal.signal(number, signal.SIG_IGN)  # it ends when all ranks have, and says why
    monitor = Monitor(Settings(**json.loads(sys.stdin.readline())))
    print(monitor.port, flush=True)
    os.close(sys.stdout.fileno())
    monitor.run()


if __name__ == "__main__":
    main()
