"""The monitor's connections: what strangers send, and how much, never reaches the ranks."""

import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from distributed.health import connections
from distributed.health.connections import Connections, Peer
from distributed.health.control_channel import _connect
from distributed.health.messages import (
    FAILURE_CHARACTERS,
    Ack,
    Heartbeat,
    Hello,
    JobDone,
    JobFailed,
    LogTail,
    Message,
    RankDone,
    RankFailed,
    StopRequest,
    StopWanted,
)
from runtime.checkout import CHECKOUT
from tests.helpers.monitor_ranks import NO_PROCESS, TOKEN, Rank, started_monitors


@pytest.fixture
def monitor() -> Iterator[Callable[..., Any]]:
    with started_monitors() as start:
        yield start


@pytest.fixture
def two() -> Iterator[Connections]:
    """The connections of a world of two, within this process."""
    listening = Connections("127.0.0.1", TOKEN, 2)
    yield listening
    while Rank.connected:
        Rank.connected.pop().leave()
    for peer in [*listening.ranks.values(), *listening._strangers.values()]:
        listening.close(peer)
    listening._listener.close()
    listening._selector.close()


def is_served(rank: Rank) -> None:
    rank.send(Heartbeat(1, "step", 1))
    rank.receive(Ack)


def next_of(listening: Connections) -> list[tuple[int, Message | None]]:
    """Return the next messages that ranks send, each with its rank."""
    deadline_s = time.monotonic() + 20
    while not (received := [(peer.rank, message) for peer, message in listening.receive(0.05)]):
        assert time.monotonic() < deadline_s
    return received


def receive_until(listening: Connections, done: Callable[[], bool]) -> list[tuple[int, Message | None]]:
    received, deadline_s = [], time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline_s
        received += [(peer.rank, message) for peer, message in listening.receive(0.05)]
    return received


def is_closed(connection: socket.socket) -> bool:
    connection.settimeout(0.01)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


GARBAGE = [
    b"\n" * 4096,
    b"[" * 200_000 + b"\n",
    b"\x00" * 100_000,
    b'{"kind": "Hello", "rank": 1, "host": "h", "pid": 1, "token": "\\ud800"}\n',
    b'{"kind": "Hello", "rank": 1, "host": "h", "pid": 1, "token": "' + b"x" * 100_000 + b'"}\n',
    b'{"kind": "StopRequest", "reason": "SIGINT"}\n',
    b'{"kind": "LastStep", "step": 1}\n',
    Hello(0, "x", 1, TOKEN + "x").to_line(),
]


def test_garbage_and_forgeries_leave_the_ranks_alone(monitor: Any) -> None:
    process, port = monitor(2)
    ranks = [Rank(port, rank) for rank in range(2)]
    for garbage in GARBAGE:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as stranger:
            # The monitor may close the connection before all is sent.
            with suppress(OSError):
                stranger.sendall(garbage)
            deadline_s = time.monotonic() + 20
            while not is_closed(stranger):
                assert time.monotonic() < deadline_s
    for rank in ranks:
        is_served(rank)
    assert process.poll() is None


def test_idle_connections_do_not_use_up_the_open_files(monitor: Any) -> None:
    process, port = monitor(2)
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (64, 64))
    first = Rank(port, 0)
    is_served(first)
    with ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
        second = Rank(port, 1)
        is_served(first)
        is_served(second)
    assert process.poll() is None


@pytest.mark.parametrize("rank", [-1, 0, 2, 1 << 70])
def test_a_rank_that_is_taken_or_does_not_exist_is_refused(two: Connections, rank: int) -> None:
    taken = Rank(two.port, 0)
    receive_until(two, lambda: 0 in two.ranks)
    other = Rank(two.port, rank)
    receive_until(two, lambda: is_closed(other.connection))
    assert set(two.ranks) == {0} and two.num_connected == 1
    taken.send(Heartbeat(1, "step", 1))
    assert next_of(two) == [(0, Heartbeat(1, "step", 1))]


@pytest.mark.parametrize("pid", [0, -1])
def test_a_rank_without_a_process_of_its_own_is_refused(two: Connections, pid: int) -> None:
    """The monitor kills a rank that does not exit: -1 would be every process of the user."""
    rank = Rank(two.port, 0, pid=pid)
    receive_until(two, lambda: is_closed(rank.connection))
    assert two.ranks == {}


def test_a_failure_is_cut_before_all_ranks_get_it(monitor: Any) -> None:
    process, port = monitor(2)
    failing, other = (Rank(port, rank) for rank in range(2))
    failing.send(RankFailed("failed: " + "x" * 8_000_000, 3))
    told = other.receive(JobFailed)
    assert told.message.startswith("failed: xxx") and len(told.message) == FAILURE_CHARACTERS and told.exit_code == 3
    failing.leave()
    other.leave()
    assert process.wait(20) == 0


def deaf_rank(two: Connections) -> tuple[Rank, Peer]:
    """Connect a rank that reads nothing, over a network whose kernels take little, as on a node that is lost."""
    rank = Rank(two.port, 1)
    receive_until(two, lambda: 1 in two.ranks)
    two.ranks[1].connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return rank, two.ranks[1]


def test_sending_waits_for_no_rank_and_tears_no_message(two: Connections) -> None:
    """With a wait of a second for each, a few hundred ranks of a lost rack would hold up all others for minutes."""
    rank, peer = deaf_rank(two)
    sent = [StopWanted(f"{number} " + "x" * 100_000) for number in range(30)]
    for message in sent:
        two.send(peer, message)
    assert len(peer.unsent) > 1_000_000
    received: list[StopWanted] = []
    reading = threading.Thread(target=lambda: received.extend(rank.receive(StopWanted) for _ in sent))
    reading.start()
    receive_until(two, lambda: not reading.is_alive())
    assert received == sent


def test_a_rank_that_never_reads_is_closed_before_it_uses_up_the_memory(two: Connections) -> None:
    rank, peer = deaf_rank(two)
    while two.ranks.get(1) is peer:
        two.send(peer, StopWanted("x" * 1_000_000))
        assert len(peer.unsent) < 2 * connections._UNSENT_BYTES
        list(two.receive(0))
    rank.leave()


def test_a_rank_whose_connection_is_closed_for_strangers_connects_again(two: Connections) -> None:
    """A flood: the monitor closes the oldest connection before it has read the hello."""
    connected: list[socket.socket] = []
    hello = Hello(1, "here", 4711, TOKEN)
    connecting = threading.Thread(target=lambda: connected.append(_connect(("127.0.0.1", two.port), hello)))
    connecting.start()
    first, _ = two._listener.accept() if two._selector.select(20) else (None, None)
    assert first is not None
    first.close()
    received = receive_until(two, lambda: 1 in two.ranks)
    while not received:
        received = [(peer.rank, message) for peer, message in two.receive(0.05)]
    assert received == [(1, Heartbeat(0, "start", 0))]
    two.send(two.ranks[1], Ack())
    connecting.join(20)
    assert connected[0].recv(100) == Ack().to_line()
    connected[0].close()


def test_a_connection_without_a_hello_is_closed_in_time(two: Connections, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_HELLO_TIMEOUT_S", 0.3)
    with socket.create_connection(("127.0.0.1", two.port), timeout=20) as stranger:
        stranger.sendall(b"{")
        receive_until(two, lambda: is_closed(stranger))


def test_a_connection_without_a_newline_is_closed_after_few_bytes(two: Connections) -> None:
    with socket.create_connection(("127.0.0.1", two.port), timeout=20) as stranger:
        stranger.sendall(b"x" * (connections._HELLO_BYTES + 1))
        receive_until(two, lambda: is_closed(stranger))


def test_a_long_message_of_a_rank_arrives_whole(two: Connections) -> None:
    rank, text = Rank(two.port, 1), "line\n" * 200_000
    sending = threading.Thread(target=rank.send, args=(LogTail(1, text),))
    sending.start()
    received = next_of(two)
    sending.join()
    assert received == [(1, LogTail(1, text))]


def test_a_large_message_may_come_in_one_part_with_the_hello(two: Connections) -> None:
    message = LogTail(1, "x" * 200_000)
    with socket.create_connection(("127.0.0.1", two.port), timeout=20) as connection:
        connection.sendall(Hello(1, "here", NO_PROCESS, TOKEN).to_line() + message.to_line())
        assert next_of(two) == [(1, message)]


def test_the_end_of_a_ranks_connection_is_reported_once(two: Connections) -> None:
    rank = Rank(two.port, 1)
    receive_until(two, lambda: 1 in two.ranks)
    rank.leave()
    assert receive_until(two, lambda: 1 not in two.ranks) == [(1, None)]
    assert list(two.receive(0.05)) == []


def test_1536_ranks_connect_under_a_login_shells_limit(monitor: Any) -> None:
    """The soft limit of open files is 1,024 when rank 0 starts the monitor, as in a login shell."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        process, port = monitor(1536)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, hard), hard))
        ranks = [Rank(port, rank) for rank in range(1536)]
        ranks[-1].send(StopRequest("SIGUSR1"))
        assert {rank.receive(StopWanted).reason for rank in ranks} == {"SIGUSR1"}
        for rank in ranks:
            rank.send(RankDone())
        for rank in ranks:
            rank.receive(JobDone)
            rank.leave()
        assert process.wait(20) == 0
    finally:
        while Rank.connected:
            Rank.connected.pop().leave()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_too_few_open_files_are_refused_with_the_limit_to_set() -> None:
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
        "from distributed.health.monitor_process import MonitorSettings, start_monitor\n"
        "start_monitor(MonitorSettings('127.0.0.1', 'here', 'x', 1536, None))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    expected = "a process may open 256 files, and needs 1568 for the connections of 1536 ranks. Fix: ulimit -n 1632"
    assert expected in done.stderr.splitlines()[-1]
