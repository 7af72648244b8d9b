"""The monitor without a job: ranks here are plain connections that say what a test wants."""

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed.health.hang_detection import PHASES, Place, Seen, patience_s, stuck_ranks
from distributed.health.monitor import Settings, start_monitor
from distributed.health.rank_log import Journal, node_log
from runtime.exit_codes import EXIT_REQUEUE

LIMIT_S, SILENT_S = 10.0, 5.0
NOBODY = 1 << 24
"""A process that cannot be: the monitor kills ranks that do not end."""


# --- Who is stuck -----------------------------------------------------------------------------------------------------


def seen(step: int, phase: str, marked_s: float, heard_s: float = 0.0) -> Seen:
    """A rank that made progress and was heard so many seconds ago."""
    return Seen(Place(step, phase, 1), -marked_s, -heard_s)


def stuck(*ranks: Seen) -> list[int]:
    return stuck_ranks(dict(enumerate(ranks)), 0.0, LIMIT_S, SILENT_S)


def test_a_job_that_moves_is_left_alone() -> None:
    assert stuck(seen(3, "step", 1.0), seen(3, "input", 9.0)) == []


def test_the_rank_that_the_others_wait_for_is_named() -> None:
    assert stuck(seen(3, "step", 11.0), seen(3, "input", 11.0), seen(3, "step", 11.0)) == [1]
    assert stuck(seen(4, "step", 45.0), seen(3, "checkpoint", 50.0), seen(4, "step", 45.0)) == [1]


def test_a_silent_rank_comes_before_those_behind() -> None:
    assert stuck(seen(3, "step", 11.0), seen(3, "step", 11.0, heard_s=11.0), seen(3, "input", 11.0)) == [1]


def test_where_all_are_at_the_same_place_all_are_named() -> None:
    assert stuck(seen(3, "step", 11.0), seen(3, "step", 12.0)) == [0, 1]


def test_ranks_that_wait_for_one_that_still_works_are_left_alone() -> None:
    """An evaluation whose shares differ: rank 0 was done long ago."""
    assert stuck(seen(9, "evaluation", 60.0), seen(9, "evaluation", 0.5)) == []


@pytest.mark.parametrize("phase", ["start", "first step", "checkpoint", "close"])
def test_what_rightly_takes_long_has_more_time(phase: str) -> None:
    behind = seen(0, phase, 0.0)
    assert patience_s(phase, LIMIT_S) > 2 * LIMIT_S
    for marked_s, named in ((2 * LIMIT_S, []), (patience_s(phase, LIMIT_S) + 1, [0])):
        behind = seen(0, phase, marked_s)
        assert stuck(behind, seen(1, "step", marked_s)) == named


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
    states = [seen(step, phase, marked_s, min(heard_s, marked_s)) for step, phase, marked_s, heard_s in ranks]
    stood_s = min(marked_s for _, _, marked_s, _ in ranks)
    named = stuck(*states)
    if stood_s <= LIMIT_S:
        assert named == []
    if stood_s > 4 * LIMIT_S:
        assert named
    assert all(states[rank].heard_s < -SILENT_S for rank in named) or not any(
        state.heard_s < -SILENT_S for state in states
    )


# --- A monitor --------------------------------------------------------------------------------------------------------


class Rank:
    """A rank's side of the connection."""

    connected: ClassVar[list["Rank"]] = []

    def __init__(self, port: int, rank: int, token: str = "right") -> None:
        self.connected.append(self)
        self.connection = socket.create_connection(("127.0.0.1", port), timeout=20)
        self.lines = self.connection.makefile()
        self.say({"hello": [rank, "here", NOBODY], "token": token})

    def say(self, message: dict[str, Any]) -> None:
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def hear(self, key: str) -> Any:
        """The next message with this key; fails where the monitor hangs up instead."""
        for line in self.lines:
            if key in (message := json.loads(line)):
                return message[key]
        raise AssertionError(f"no {key}: the monitor has closed the connection")

    def leave(self) -> None:
        self.lines.close()
        self.connection.close()


@pytest.fixture
def monitor() -> Iterator[Callable[..., tuple["subprocess.Popen[str]", int]]]:
    started: list[subprocess.Popen[str]] = []

    def start(size: int, hang_s: float | None = None) -> tuple["subprocess.Popen[str]", int]:
        process, port = start_monitor(Settings("127.0.0.1", "here", "right", size, hang_s))
        started.append(process)
        return process, port

    yield start
    while Rank.connected:
        Rank.connected.pop().leave()
    for process in started:
        process.kill()
        process.wait()


def test_all_ranks_hear_who_died(monitor: Any, tmp_path: Path) -> None:
    process, port = monitor(3)
    ranks = [Rank(port, rank) for rank in range(3)]
    ranks[0].say({"folder": str(tmp_path)})
    ranks[2].say({"place": [7, "input", 20]})
    ranks[2].hear("tick")
    ranks[2].leave()
    for rank in ranks[:2]:
        end = rank.hear("end")
        assert (end["rank"], end["exit_code"]) == (2, EXIT_REQUEUE)
        assert "is gone" in end["message"] and "step 7, phase input" in end["message"]
        rank.leave()
    process.wait(10)
    assert json.loads((tmp_path / "outcome.json").read_text())["exit_code"] == EXIT_REQUEUE
    assert "rank 2 on here is gone" in (tmp_path / "log.txt").read_text()


def test_a_death_comes_before_the_errors_that_it_brings_about(monitor: Any) -> None:
    _, port = monitor(3)
    ranks = [Rank(port, rank) for rank in range(3)]
    for rank in ranks:
        rank.say({"place": [1, "step", 1]})
        rank.hear("tick")
    ranks[0].say({"failure": {"message": "failed: connection closed by peer", "exit_code": 1}})
    time.sleep(0.3)
    ranks[1].leave()
    assert ranks[2].hear("end")["rank"] == 1


def test_an_error_of_its_own_is_told_with_its_code(monitor: Any) -> None:
    _, port = monitor(2)
    ranks = [Rank(port, rank) for rank in range(2)]
    ranks[1].say({"failure": {"message": "failed: no such file", "exit_code": 3}})
    end = ranks[0].hear("end")
    assert (end["rank"], end["exit_code"], end["message"]) == (1, 3, "failed: no such file")


def test_a_job_that_ends_well_ends_the_monitor(monitor: Any) -> None:
    process, port = monitor(2)
    ranks = [Rank(port, rank) for rank in range(2)]
    ranks[0].say({"done": True})
    ranks[1].say({"done": True})
    for rank in ranks:
        assert rank.hear("done") is True
        rank.leave()
    assert process.wait(10) == 0


@pytest.mark.parametrize(
    "stranger",
    [b"GET / HTTP/1.1\r\n\r\n", b'{"place": [1, "step", 1]}\n', b'{"hello": [1, "x", 1], "token": "wrong"}\n'],
)
def test_strangers_are_not_heard(monitor: Any, stranger: bytes) -> None:
    process, port = monitor(2)
    ranks = [Rank(port, rank) for rank in range(2)]
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(stranger)
        assert connection.recv(1) == b""
    ranks[0].say({"place": [1, "step", 1]})
    ranks[0].hear("tick")
    assert process.poll() is None


def test_ranks_that_never_come_are_named(monitor: Any) -> None:
    _, port = monitor(3, hang_s=0.3)
    end = Rank(port, 1).hear("end")
    assert end["rank"] == 0 and "absent: ranks [0, 2]" in end["message"]


def test_stacks_of_all_are_kept_when_the_job_stands_still(monitor: Any, tmp_path: Path) -> None:
    _, port = monitor(2, hang_s=1.0)
    ranks = [Rank(port, rank) for rank in range(2)]
    ranks[0].say({"folder": str(tmp_path)})
    ranks[0].say({"place": [4, "step", 9]})
    ranks[1].say({"place": [4, "input", 9]})
    for rank, where in enumerate(("in a collective", "in a loader")):
        assert ranks[rank].hear("stacks") == {}
        ranks[rank].say({"stacks": where, "neighbours": {}})
    end = ranks[0].hear("end")
    assert end["rank"] == 1 and "hangs at step 4, phase input" in end["message"]
    (stacks,) = tmp_path.glob("failures/*/stacks.txt")
    assert stacks.read_text().startswith("==== rank 1 on here, step 4, phase input\nin a loader")
    assert "in a collective" in stacks.read_text()


# --- Logs -------------------------------------------------------------------------------------------------------------


def test_what_is_said_before_the_folder_is_known_is_kept(tmp_path: Path) -> None:
    journal = Journal(0, "n1")
    journal.note("early\nlines")
    journal.open_in(tmp_path)
    journal.note("later")
    journal.close()
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split("  ", 3)[1:3] for line in lines] == [["n1", "rank 0"]] * len(lines)
    assert [line.split("  ", 3)[3] for line in lines if "logs from here" not in line] == ["early", "lines", "later"]


def test_other_ranks_leave_the_shared_folder_alone(tmp_path: Path) -> None:
    run = tmp_path / f"journal-{os.getpid()}"
    run.mkdir()
    journal = Journal(7, "n1")
    journal.open_in(run)
    journal.note("on the node")
    assert list(run.iterdir()) == []
    assert "on the node" in node_log(run.name, 7).read_text()
    assert "on the node" in journal.tail()
    journal.close()
