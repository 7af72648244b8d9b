"""The monitor without a job: ranks are plain connections that send the messages of the test."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed.health.hang_detection import (
    PHASES,
    Place,
    RankState,
    own_pause_s,
    phase_timeout_s,
    storage_timeout_s,
    stuck_ranks,
)
from distributed.health.messages import (
    Ack,
    Failure,
    Heartbeat,
    Hello,
    JobDone,
    JobFailed,
    LogTail,
    Message,
    MessageError,
    OpenLog,
    RankDone,
    RankFailed,
    Stacks,
    StacksRequest,
    parse_message,
)
from distributed.health.rank_log import RankLog, node_log
from distributed.health.stack_dump import storage_wait
from runtime.exit_codes import EXIT_REQUEUE
from tests.helpers.monitor_ranks import Rank, started_monitors

LIMIT_S, SILENT_S = 10.0, 5.0

# --- Stuck ranks ------------------------------------------------------------------------------------------------------


def seen(step: int, phase: str, progress_s: float, heartbeat_s: float = 0.0) -> RankState:
    """State of a rank whose last progress and last heartbeat were that many seconds ago."""
    return RankState(Place(step, phase, 1), -progress_s, -heartbeat_s)


def stuck(*ranks: RankState) -> list[int]:
    return stuck_ranks(dict(enumerate(ranks)), 0.0, LIMIT_S, SILENT_S)


def test_a_job_that_moves_is_left_alone() -> None:
    assert stuck(seen(3, "step", 1.0), seen(3, "input", 9.0)) == []


def test_the_rank_that_the_others_wait_for_is_named() -> None:
    assert stuck(seen(3, "step", 11.0), seen(3, "input", 11.0), seen(3, "step", 11.0)) == [1]
    assert stuck(seen(4, "step", 45.0), seen(3, "checkpoint", 50.0), seen(4, "step", 45.0)) == [1]


def test_a_silent_rank_comes_before_those_behind() -> None:
    assert stuck(seen(3, "step", 11.0), seen(3, "step", 11.0, heartbeat_s=11.0), seen(3, "input", 11.0)) == [1]


def test_where_all_are_at_the_same_place_all_are_named() -> None:
    assert stuck(seen(3, "step", 11.0), seen(3, "step", 12.0)) == [0, 1]


def test_ranks_that_wait_for_one_that_still_works_are_left_alone() -> None:
    """Uneven shares of an evaluation: rank 0 finished long ago, rank 1 still makes progress."""
    assert stuck(seen(9, "evaluation", 60.0), seen(9, "evaluation", 0.5)) == []


@pytest.mark.parametrize("phase", ["start", "first step", "checkpoint", "close"])
def test_what_rightly_takes_long_has_more_time(phase: str) -> None:
    assert phase_timeout_s(phase, LIMIT_S) > 2 * LIMIT_S
    for progress_s, named in ((2 * LIMIT_S, []), (phase_timeout_s(phase, LIMIT_S) + 1, [0])):
        behind = seen(0, phase, progress_s)
        assert stuck(behind, seen(1, "step", progress_s)) == named


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from(PHASES), st.floats(0, 100), st.floats(0, 100)),
        min_size=1,
        max_size=8,
    )
)
def test_somebody_is_named_exactly_when_nobody_moves_for_long_enough(
    ranks: list[tuple[int, str, float, float]],
) -> None:
    states = [
        seen(step, phase, progress_s, min(heartbeat_s, progress_s)) for step, phase, progress_s, heartbeat_s in ranks
    ]
    no_progress_s = min(progress_s for _, _, progress_s, _ in ranks)
    named = stuck(*states)
    if no_progress_s <= LIMIT_S:
        assert named == []
    if no_progress_s > 4 * LIMIT_S:
        assert named
    assert all(states[rank].heartbeat_s < -SILENT_S for rank in named) or not any(
        state.heartbeat_s < -SILENT_S for state in states
    )


# --- Messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        Hello(3, "n1", 99, "token"),
        OpenLog("/runs/\u00e9", "lock\n"),
        Heartbeat(7, "first step", 12),
        RankFailed("failed: two\nlines", 1),
        Stacks("mine", {2: "theirs", 10: ""}, {2: ", process 9 waits"}),
        LogTail(4, "log"),
        RankDone(),
        Ack(),
        StacksRequest({2: 4711}),
        JobFailed(1, "n2", "is gone", EXIT_REQUEUE, True),
        JobDone(),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_message_is_one_line_and_comes_back_as_it_was(message: Message) -> None:
    line = message.to_line()
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert parse_message(line) == message


MALFORMED = [
    b"GET / HTTP/1.1",
    b"\xff\xfe",
    b"[" * 100_000,
    b"5",
    b"[]",
    b'{"kind": "Heartbeat"}',
    b'{"kind": "Heartbeat", "step": 1, "phase": "step", "progress_count": 1, "more": 1}',
    b'{"kind": "Heartbeat", "step": "1", "phase": "step", "progress_count": 1}',
    b'{"kind": "Heartbeat", "step": true, "phase": "step", "progress_count": 1}',
    b'{"kind": "Stacks", "own": "x", "neighbours": 3}',
    b'{"kind": "Stacks", "own": "x", "neighbours": {"one": "x"}}',
    b'{"kind": "Stacks", "own": "x", "neighbours": {"1": 2}}',
]


@pytest.mark.parametrize("line", MALFORMED, ids=lambda line: line[:60].decode(errors="replace"))
def test_a_malformed_line_is_an_error_of_its_own(line: bytes) -> None:
    with pytest.raises(MessageError):
        parse_message(line)


@pytest.mark.parametrize("line", [b"{}", b'{"kind": "News"}', b'{"kind": ["Ack"]}', b'{"kind": null, "step": 1}'])
def test_a_message_of_an_unknown_kind_is_none(line: bytes) -> None:
    assert parse_message(line) is None


# --- The monitor process ----------------------------------------------------------------------------------------------


@pytest.fixture
def monitor() -> Iterator[Callable[..., tuple["subprocess.Popen[str]", int]]]:
    with started_monitors() as start:
        yield start


def test_a_job_that_was_replaced_leaves_the_outcome_of_the_other_alone(monitor: Any, tmp_path: Path) -> None:
    (tmp_path / "outcome.json").write_text("another's")
    for lock, outcome in (("another", "another's"), ("ours", None)):
        (tmp_path / "train.lock").write_text(lock)
        process, port = monitor(1)
        (rank,) = [Rank(port, 0)]
        rank.send(OpenLog(str(tmp_path), "ours"), RankFailed("failed: taken over", 2))
        rank.receive(JobFailed)
        rank.leave()
        process.wait(10)
        found = (tmp_path / "outcome.json").read_text()
        assert found == outcome if outcome else json.loads(found)["exit_code"] == 2


def test_all_ranks_hear_who_died(monitor: Any, tmp_path: Path) -> None:
    process, port = monitor(3)
    ranks = [Rank(port, rank) for rank in range(3)]
    ranks[0].send(OpenLog(str(tmp_path), ""))
    ranks[2].send(Heartbeat(7, "input", 20))
    ranks[2].receive(Ack)
    ranks[2].leave()
    for rank in ranks[:2]:
        failure = rank.receive(JobFailed).failure()
        assert (failure.rank, failure.exit_code) == (2, EXIT_REQUEUE)
        assert "is gone" in failure.message and "step 7, phase input" in failure.message
        rank.leave()
    process.wait(10)
    assert json.loads((tmp_path / "outcome.json").read_text())["exit_code"] == EXIT_REQUEUE
    assert "rank 2 on here is gone" in (tmp_path / "log.txt").read_text()


def test_a_death_comes_before_the_errors_that_it_brings_about(monitor: Any) -> None:
    _, port = monitor(3)
    ranks = [Rank(port, rank) for rank in range(3)]
    for rank in ranks:
        rank.send(Heartbeat(1, "step", 1))
        rank.receive(Ack)
    ranks[0].send(RankFailed("failed: connection closed by peer", 1))
    time.sleep(0.3)
    ranks[1].leave()
    assert ranks[2].receive(JobFailed).rank == 1


def test_an_error_of_its_own_is_told_with_its_code(monitor: Any) -> None:
    _, port = monitor(2)
    ranks = [Rank(port, rank) for rank in range(2)]
    ranks[1].send(RankFailed("failed: no such file", 3))
    assert ranks[0].receive(JobFailed).failure() == Failure(1, "here", "failed: no such file", 3)


def test_a_job_that_ends_well_ends_the_monitor(monitor: Any) -> None:
    process, port = monitor(2)
    ranks = [Rank(port, rank) for rank in range(2)]
    ranks[0].send(RankDone())
    ranks[1].send(RankDone())
    for rank in ranks:
        rank.receive(JobDone)
        rank.leave()
    assert process.wait(10) == 0


@pytest.mark.parametrize(
    "stranger",
    [b"GET / HTTP/1.1\r\n\r\n", b"{}\n", Heartbeat(1, "step", 1).to_line(), Hello(1, "x", 1, "wrong").to_line()],
)
def test_strangers_are_not_heard(monitor: Any, stranger: bytes) -> None:
    process, port = monitor(2)
    ranks = [Rank(port, rank) for rank in range(2)]
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(stranger)
        assert connection.recv(1) == b""
    ranks[0].send(Heartbeat(1, "step", 1))
    ranks[0].receive(Ack)
    assert process.poll() is None


@pytest.mark.parametrize("line", [*MALFORMED, Heartbeat(1, "dinner", 1).to_line()[:-1]], ids=lambda line: line[:60])
def test_a_rank_that_sends_a_malformed_line_is_cut_off_and_named(monitor: Any, line: bytes) -> None:
    _, port = monitor(2)
    ranks = [Rank(port, rank) for rank in range(2)]
    for rank in ranks:
        rank.send(Heartbeat(1, "step", 1))
        rank.receive(Ack)
    ranks[1].connection.sendall(line + b"\n")
    assert ranks[0].receive(JobFailed).rank == 1


def test_a_message_of_an_unknown_kind_changes_nothing(monitor: Any) -> None:
    process, port = monitor(1)
    rank = Rank(port, 0)
    rank.connection.sendall(b'{"kind": "News", "step": 1}\n')
    rank.send(RankDone())
    rank.receive(JobDone)
    rank.leave()
    assert process.wait(10) == 0


def test_ranks_that_never_come_are_named(monitor: Any) -> None:
    _, port = monitor(3, hang_timeout_s=0.3)
    failure = Rank(port, 1).receive(JobFailed).failure()
    assert failure.rank == 0 and "missing ranks: [0, 2]" in failure.message


def test_a_pause_of_the_whole_job_is_no_hang(monitor: Any, tmp_path: Path) -> None:
    """As after `scontrol suspend` and `resume`, or on a paused virtual machine: monitor and ranks stop and continue together."""
    process, port = monitor(2, hang_timeout_s=5.0)
    ranks = [Rank(port, rank) for rank in range(2)]
    ranks[0].send(OpenLog(str(tmp_path), ""))
    for rank in ranks:
        rank.send(Heartbeat(4, "step", 9))
        rank.receive(Ack)
    process.send_signal(signal.SIGSTOP)
    time.sleep(8)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.5)
    for rank in ranks:
        rank.send(Heartbeat(5, "step", 10), RankDone())
        assert isinstance(parse_message(rank.lines.readline()), Ack)
    for rank in ranks:
        rank.receive(JobDone)
        rank.leave()
    assert process.wait(10) == 0
    assert "monitor: paused for" in (tmp_path / "log.txt").read_text()


@given(st.floats(0, 100), st.floats(0, 2))
def test_only_a_wait_that_takes_far_too_long_is_a_pause(pause_s: float, expected_s: float) -> None:
    found_s = own_pause_s(expected_s + pause_s, expected_s)
    assert found_s == 0 if pause_s < 1.9 else pause_s <= 2.1 or found_s == pytest.approx(pause_s)


def test_stacks_of_all_are_kept_when_the_job_stands_still(monitor: Any, tmp_path: Path) -> None:
    _, port = monitor(2, hang_timeout_s=1.0)
    ranks = [Rank(port, rank) for rank in range(2)]
    ranks[0].send(OpenLog(str(tmp_path), ""), Heartbeat(4, "step", 9))
    ranks[1].send(Heartbeat(4, "input", 9))
    for rank, where in enumerate(("in a collective", "in a loader")):
        assert ranks[rank].receive(StacksRequest).neighbours == {}
        ranks[rank].send(Stacks(where, {}, {}))
    failure = ranks[0].receive(JobFailed).failure()
    assert failure.rank == 1 and "hangs at step 4, phase input" in failure.message
    (stacks,) = tmp_path.glob("failures/*/stacks.txt")
    assert stacks.read_text().startswith("==== rank 1 on here, step 4, phase input\nin a loader")
    assert "in a collective" in stacks.read_text()


@pytest.fixture
def waits_for_storage(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A process in uninterruptible sleep (state D), and the named pipe that wakes it up.

    It waits for a child that the kernel has not let go of yet: the child opens the pipe before it becomes another program.
    """
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    child = f"file_actions=[(os.POSIX_SPAWN_OPEN, 5, {str(pipe)!r}, os.O_RDONLY, 0)]"
    program = f"import os, time; os.posix_spawn('/bin/true', ['true'], os.environ, {child}); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", program])
    while " (D, in " not in storage_wait(process.pid):
        time.sleep(0.01)
    yield process.pid, pipe
    wake_up(pipe)
    process.kill()
    process.wait()


def wake_up(pipe: Path) -> None:
    with suppress(OSError):
        os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))


def test_a_rank_that_waits_for_a_disk_has_more_time(
    monitor: Any, tmp_path: Path, waits_for_storage: tuple[int, Path]
) -> None:
    """The disk answers before the longer limit is over, and the job continues."""
    pid, pipe = waits_for_storage
    process, port = monitor(2, hang_timeout_s=4.0)
    ranks = [Rank(port, 0), Rank(port, 1, pid=pid)]
    ranks[0].send(OpenLog(str(tmp_path), ""))
    for rank in ranks:
        rank.send(Heartbeat(4, "step", 9))
    for rank in ranks:
        rank.receive(StacksRequest)
        rank.send(Stacks("", {}, {}))
    while "disk I/O: rank 1" not in (tmp_path / "log.txt").read_text():
        time.sleep(0.05)
    wake_up(pipe)
    for rank in ranks:
        rank.send(Heartbeat(5, "step", 10), RankDone())
    for rank in ranks:
        rank.receive(JobDone)
        rank.leave()
    assert process.wait(10) == 0
    log = (tmp_path / "log.txt").read_text()
    assert f"process {pid} waits for a disk or file server (D, in " in log


def test_a_rank_of_another_node_that_waits_for_a_disk_for_ever_is_named_in_the_end(monitor: Any) -> None:
    """Its own answers say so. A rank that does not wait has the usual limit."""
    _, port = monitor(1, hang_timeout_s=0.5)
    rank = Rank(port, 0, host="elsewhere")
    began_s = time.monotonic()
    rank.send(Heartbeat(4, "step", 9))
    waits = {0: ", process 9 waits for a disk or file server (D, in folio_wait)"}
    for line in rank.lines:
        message = parse_message(line)
        if isinstance(message, StacksRequest):
            rank.send(Stacks("", {}, waits))
        elif isinstance(message, JobFailed):
            assert "phase step, process 9 waits for a disk or file server" in message.message
            break
    assert time.monotonic() - began_s > storage_timeout_s("step", 0.5) > 3 * phase_timeout_s("step", 0.5)


# --- Logs -------------------------------------------------------------------------------------------------------------


def test_lines_from_before_the_folder_is_known_are_kept(tmp_path: Path) -> None:
    log = RankLog(0, "n1")
    log.info("early\nlines")
    assert [line.split("  ", 3)[1:] for line in log.tail().splitlines()] == [
        ["n1", "rank 0", "early"],
        ["n1", "rank 0", "lines"],
    ]
    log.open_in(tmp_path)
    log.info("later")
    log.close()
    log.info("after the end")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split("  ", 3)[1:3] for line in lines] == [["n1", "rank 0"]] * len(lines)
    assert [line.split("  ", 3)[3] for line in lines if "logs here" not in line] == ["early", "lines", "later"]


def test_other_ranks_leave_the_shared_folder_alone(tmp_path: Path) -> None:
    run = tmp_path / f"rank-log-{os.getpid()}"
    run.mkdir()
    log = RankLog(7, "n1")
    log.open_in(run)
    log.info("on the node")
    assert list(run.iterdir()) == []
    assert "on the node" in node_log(run.name, 7).read_text()
    assert "on the node" in log.tail()
    log.close()


def test_a_full_disk_is_reported_once_and_costs_only_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.txt").symlink_to("/dev/full")
    log = RankLog(0, "n1")
    log.info("early")
    log.open_in(tmp_path)
    log.info("lost")
    log.warning("still on standard error")
    log.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "no log in" in lines[0] and "No space left on device" in lines[0]
    assert lines[1] == "still on standard error"


def test_text_that_is_not_unicode_is_logged_all_the_same(tmp_path: Path) -> None:
    """A path with bytes that are not UTF-8, which Python reads as surrogates."""
    log = RankLog(0, "n1")
    log.open_in(tmp_path)
    log.info("bad\udcff.mp4")
    assert "bad\\udcff.mp4" in log.tail()
    path = Path(log.write_failure_file("rank-00001.log", "bad\udcff.mp4"))
    assert path.read_text() == "bad\\udcff.mp4"
    log.close()


def test_a_folder_that_is_gone_costs_only_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").write_text("a file in the folder's place")
    log = RankLog(0, "n1")
    log.open_in(tmp_path / "run")
    log.info("in memory")
    assert "in memory" in log.tail()
    assert "no log in" in capsys.readouterr().err
