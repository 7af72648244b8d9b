"""The monitor of a job: receives every rank's heartbeats, detects dead and hung ranks, ends the job and logs why.

Every rank holds a connection to it. The kernel closes the connection of a process that is killed, so a death is detected at
once, on any backend and under any launcher. A stopped process or a lost node stops sending heartbeats instead.

It is a process of its own, on rank 0's node but in its own session. So it sees the end of a job that its launcher kills within
a second (mpirun), judges rank 0 like any other rank, and no thread that holds the GIL delays it. It imports no torch. Rank 0's
control channel starts it (monitor_process.py).
"""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from runtime.exit_codes import EXIT_FAILURE, EXIT_REQUEUE

from . import messages
from .connections import Connections, Peer
from .hang_detection import RankState, heartbeat_timeout_s, own_pause_s, phase_timeout_s, storage_timeout_s, stuck_ranks
from .messages import FAILURE_CHARACTERS, Failure, Message
from .monitor_process import MonitorSettings
from .rank_log import RankLog, read_node_log
from .stack_dump import stacks_of, storage_wait
from .stop_agreement import StopRelay

_POLL_S = 0.25

# Grace period: an error on one rank is often caused by another rank's death, which we may see slightly later.
_GRACE_S = 1.0

# For all ranks to send their stacks; py-spy may take 20 s.
_STACKS_TIMEOUT_S = 45.0

# For all ranks to receive the last message.
_LAST_MESSAGE_TIMEOUT_S = 3.0

# For the ranks on the monitor's node to exit after the last message.
_EXIT_TIMEOUT_S = 15.0


class Monitor:
    """The monitor of one job; `run` returns when the job has ended."""

    def __init__(self, settings: MonitorSettings) -> None:
        self._connections = Connections(settings.address, settings.token, settings.world_size)
        self.port = self._connections.port
        self._peers = self._connections.ranks
        self._host, self._world_size = settings.host, settings.world_size
        self._hang_timeout_s = settings.hang_timeout_s
        self._silent_after_s = heartbeat_timeout_s(settings.world_size)
        self._log = RankLog("monitor", settings.host)
        self._stop = StopRelay()
        self._started_s = time.monotonic()
        self._failures: list[tuple[float, Failure]] = []
        """Each with the time from which it counts."""
        self._failed_ranks: set[int] = set()
        """Ranks that have sent a failure, and print it themselves."""
        self._verdict: Failure | None = None
        self._all_done = False
        self._neighbours: dict[int, str] = {}
        """Stacks of silent ranks, from other processes on their nodes."""
        self._storage_waits: dict[int, str] = {}
        """Ranks that waited for storage when their stacks were collected, with a clause that says so."""
        self._patient_until_s = 0.0
        """A hang is not judged before this time, because a rank waits for storage."""

    def run(self) -> None:
        parent = os.getppid()
        while self._verdict is None and not self._all_done:
            waiting_since_s = time.monotonic()
            self._receive(_POLL_S)
            self._allow_for(own_pause_s(time.monotonic() - waiting_since_s, _POLL_S))
            self._judge_failures()
            if self._hang_timeout_s is not None and self._verdict is None:
                if self._connections.num_connected < self._world_size:
                    self._judge_arrival(self._hang_timeout_s)
                elif len(self._peers) == self._world_size:
                    self._judge_progress(self._hang_timeout_s)
            if not self._peers and os.getppid() != parent:
                # Rank 0 ended before any rank connected.
                return
        ended_s = time.monotonic()
        while self._peers and time.monotonic() < ended_s + _LAST_MESSAGE_TIMEOUT_S:
            self._receive(0.05)
        if self._verdict is not None:
            self._kill_remaining(ended_s + _EXIT_TIMEOUT_S)
            self._log.start_report()

    def _allow_for(self, pause_s: float) -> None:
        """Count a pause of this process as no time: it could see no heartbeat, and most likely the ranks were paused too."""
        if pause_s == 0:
            return
        self._log.info(f"monitor: paused for {pause_s:.0f} s (suspended, or its node was): not counted as a hang")
        now_s = time.monotonic()
        self._started_s += pause_s
        for peer in self._peers.values():
            progress_s, heartbeat_s = (
                min(now_s, time_s + pause_s) for time_s in (peer.state.progress_s, peer.state.heartbeat_s)
            )
            peer.state = RankState(peer.state.place, progress_s, heartbeat_s)

    def _kill_remaining(self, deadline_s: float) -> None:
        """Kill ranks on this node that do not exit: a stopped rank, or one blocked in a library that holds the GIL, cannot act
        on the last message, and if no rank exits, no launcher ends the job. Rank 0 is always on this node."""

        def on_this_node() -> list[Peer]:
            return [peer for peer in self._peers.values() if peer.host == self._host]

        while on_this_node() and time.monotonic() < deadline_s:
            self._receive(0.05)
        for peer in on_this_node():
            self._log.warning(f"{peer} did not exit within {_EXIT_TIMEOUT_S:.0f} s: killed")
            with suppress(OSError):
                os.kill(peer.pid, signal.SIGKILL)

    # --- Messages -----------------------------------------------------------------------------------------------------

    def _receive(self, wait_s: float) -> None:
        for peer, message in self._connections.receive(wait_s):
            if message is None:
                self._rank_is_gone(peer)
                continue
            try:
                self._handle(peer, message)
            # A broken rank must not end the monitor: the other ranks need it to learn why the job ends.
            except Exception as error:
                self._log.warning(f"monitor: {peer} sent a {type(message).__name__} that failed: {error!r}")
                self._connections.close(peer)
                self._rank_is_gone(peer)

    def _handle(self, peer: Peer, message: Message) -> None:
        now_s = time.monotonic()
        if isinstance(message, messages.OpenLog):
            self._log.open_in(Path(message.folder), message.lock)
        elif isinstance(message, messages.Heartbeat):
            place, before = message.place(), peer.state
            has_progress = place.progress_count != before.place.progress_count
            peer.state = RankState(place, now_s if has_progress else before.progress_s, now_s)
            self._connections.send(peer, messages.Ack())
        elif isinstance(message, messages.RankFailed):
            peer.leaving = True
            text = message.message[:FAILURE_CHARACTERS]
            failure = Failure(peer.rank, peer.host, text, message.exit_code)
            self._failures.append((now_s + _GRACE_S, failure))
            self._failed_ranks.add(peer.rank)
        elif isinstance(message, messages.Stacks):
            peer.stacks = message.own
            self._neighbours |= message.neighbours
            self._storage_waits |= message.storage_waits
        elif isinstance(message, messages.LogTail):
            self._write_rank_log(message.rank, message.text)
        elif isinstance(message, messages.RankDone):
            peer.leaving = True
            peers = self._peers.values()
            self._all_done = len(peers) == self._world_size and all(each.leaving for each in peers)
            if self._all_done:
                self._send_all(messages.JobDone())
        else:
            for rank, reply in self._stop.replies(peer.rank, message, set(self._peers)):
                self._connections.send(self._peers[rank], reply)

    def _rank_is_gone(self, peer: Peer) -> None:
        if peer.leaving or self._verdict or self._all_done:
            return
        message = f"is gone: its process was killed or crashed, or its node failed, at {peer.state.place}"
        self._failures.append((time.monotonic(), Failure(peer.rank, peer.host, message, EXIT_REQUEUE)))

    def _send_all(self, message: Message) -> None:
        for peer in self._peers.values():
            self._connections.send(peer, message)

    # --- Decisions ----------------------------------------------------------------------------------------------------

    def _judge_failures(self) -> None:
        if not self._failures:
            return
        due_s, failure = min(self._failures, key=lambda entry: entry[0])
        if due_s > time.monotonic():
            return
        silent = [self._peers[rank] for rank in sorted(self._peers) if self._is_silent(self._peers[rank])]
        if failure.exit_code == EXIT_FAILURE and silent:
            # Most likely a collective that timed out waiting for the silent rank.
            first = silent[0]
            message = f"hangs at {self._describe(first)}; then {failure}"
            failure = Failure(first.rank, first.host, message, EXIT_REQUEUE)
        self._end(failure)

    def _judge_arrival(self, hang_timeout_s: float) -> None:
        limit_s = phase_timeout_s("start", hang_timeout_s)
        if time.monotonic() - self._started_s > limit_s:
            missing = [rank for rank in range(self._world_size) if rank not in self._peers]
            message = f"did not connect within {limit_s:.0f} s; missing ranks: {missing}"
            self._end(Failure(missing[0], "an unknown host", message, EXIT_REQUEUE))

    def _judge_progress(self, hang_timeout_s: float) -> None:
        stuck = self._stuck(hang_timeout_s) if time.monotonic() >= self._patient_until_s else []
        if not stuck:
            return
        no_progress_s = time.monotonic() - max(peer.state.progress_s for peer in self._peers.values())
        named = "; ".join(f"{self._peers[rank]} at {self._describe(self._peers[rank])}" for rank in stuck[:8])
        self._log.warning(
            f"hang: no rank made progress for {no_progress_s:.0f} s (distributed.hang_timeout_s={hang_timeout_s:g}), "
            f"waiting for {named}{f', and {len(stuck) - 8} more' if len(stuck) > 8 else ''}. Collecting the stacks of all ranks"
        )
        path = self._collect_stacks(stuck)
        if self._failures or len(self._peers) < self._world_size:
            # A rank died meanwhile, which is the better reason, or left.
            return
        if not self._stuck(hang_timeout_s):
            self._log.warning(f"hang ended: the job makes progress again; stacks: {path}")
            return
        if self._waits_for_storage(stuck, no_progress_s, hang_timeout_s):
            return
        first, *others = stuck
        also = f", and ranks {others}" if others else ""
        message = f"hangs at {self._describe(self._peers[first])}{also}; stacks of all ranks: {path}"
        self._end(Failure(first, self._peers[first].host, message, EXIT_REQUEUE))

    def _waits_for_storage(self, stuck: list[int], no_progress_s: float, hang_timeout_s: float) -> bool:
        """Return whether to give the job more time, because the kernel says that a stuck rank waits for a disk or file server."""
        waiting = [rank for rank in stuck if self._storage_clause(self._peers[rank])]
        if not waiting:
            return False
        phase = self._peers[waiting[0]].state.place.phase
        limit_s = storage_timeout_s(phase, hang_timeout_s)
        if no_progress_s >= limit_s:
            return False
        # If storage recovers now, ranks have this time to make progress.
        more_s = min(phase_timeout_s(phase, hang_timeout_s), limit_s - no_progress_s)
        self._patient_until_s = time.monotonic() + more_s
        first = self._peers[waiting[0]]
        self._log.warning(
            f"disk I/O: {first}{self._storage_clause(first)}. The job has {limit_s - no_progress_s:.0f} s more to make progress"
        )
        return True

    def _stuck(self, hang_timeout_s: float) -> list[int]:
        states = {rank: peer.state for rank, peer in self._peers.items()}
        return stuck_ranks(states, time.monotonic(), hang_timeout_s, self._silent_after_s)

    def _is_silent(self, peer: Peer) -> bool:
        return time.monotonic() - peer.state.heartbeat_s > self._silent_after_s

    def _describe(self, peer: Peer) -> str:
        """Return a rank's place, for how long it has sent no heartbeat, and whether it waits for storage."""
        place = str(peer.state.place)
        if self._is_silent(peer):
            place += f", no heartbeat for {time.monotonic() - peer.state.heartbeat_s:.0f} s"
        return place + self._storage_clause(peer)

    def _storage_clause(self, peer: Peer) -> str:
        """Return stack_dump's clause about a rank that waits for storage, else "". Of another node it is the last answer's."""
        return storage_wait(peer.pid) if peer.host == self._host else self._storage_waits.get(peer.rank, "")

    def _collect_stacks(self, stuck: list[int]) -> str:
        """Ask every rank for its stacks, and a neighbour for those of each silent rank; returns the file of the answers."""
        self._storage_waits.clear()
        silent = [rank for rank in self._peers if self._is_silent(self._peers[rank])]
        asked = [rank for rank in sorted(self._peers) if rank not in silent]
        for rank in asked:
            self._ask_for_stacks(self._peers[rank], asked, silent)
        # This process dumps the stacks of silent ranks on its own node.
        for peer in [self._peers[rank] for rank in silent]:
            if peer.host == self._host:
                self._neighbours[peer.rank] = stacks_of(peer.pid)
        deadline_s = time.monotonic() + _STACKS_TIMEOUT_S
        while time.monotonic() < deadline_s and any(
            self._peers[rank].stacks is None for rank in asked if rank in self._peers
        ):
            self._receive(_POLL_S)
        parts = []
        for rank in [*stuck, *(rank for rank in sorted(self._peers) if rank not in stuck)]:
            if rank in self._peers:
                peer = self._peers[rank]
                text = peer.stacks or self._neighbours.get(rank) or "(no answer)"
                parts.append(f"==== {peer}, {self._describe(peer)}\n{text}\n")
        self._log.warning("".join(parts[:1]))
        return self._log.write_failure_file("stacks.txt", "\n".join(parts))

    def _ask_for_stacks(self, peer: Peer, asked: list[int], silent: list[int]) -> None:
        """Ask a rank for its stacks; the first one on a node is also asked for those of the silent ranks there."""
        peer.stacks = None
        is_first_on_node = peer.rank == min(rank for rank in asked if self._peers[rank].host == peer.host)
        neighbours = [self._peers[rank] for rank in silent if self._peers[rank].host == peer.host]
        is_asked_for_neighbours = is_first_on_node and peer.host != self._host
        pids = {neighbour.rank: neighbour.pid for neighbour in neighbours if is_asked_for_neighbours}
        self._connections.send(peer, messages.StacksRequest(pids))

    def _write_rank_log(self, rank: int, text: str) -> None:
        # Rank 0's log is in the run folder already.
        if rank != 0 and text:
            self._log.write_failure_file(f"rank-{rank:05d}.log", text)

    def _end(self, failure: Failure) -> None:
        self._verdict = failure
        log = self._log.info if failure.rank in self._failed_ranks else self._log.warning
        log(f"the job ends: {failure}")
        self._log.write_outcome(failure.exit_code, str(failure))
        cannot_send_log = failure.rank not in self._peers or self._is_silent(self._peers[failure.rank])
        if cannot_send_log and failure.host == self._host and self._log.folder is not None:
            self._write_rank_log(failure.rank, read_node_log(self._log.folder.name, failure.rank))
        send_log = cannot_send_log and failure.host != self._host
        self._send_all(messages.JobFailed(**asdict(failure), send_log=send_log))


def main() -> None:
    monitor = Monitor(MonitorSettings(**json.loads(sys.stdin.readline())))
    print(monitor.port, flush=True)
    os.close(sys.stdout.fileno())
    monitor.run()


if __name__ == "__main__":
    main()
