"""A monitor without a job: ranks are plain connections that send the messages of the test."""

import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar, TypeVar

from distributed.health.messages import Hello, Message, parse_message
from distributed.health.monitor_process import MonitorSettings, start_monitor

NO_PROCESS = 1 << 24
"""A process id that cannot exist: the monitor kills ranks that do not exit."""

TOKEN = "right"

Kind = TypeVar("Kind", bound=Message)


class Rank:
    """A rank's side of the connection."""

    connected: ClassVar[list["Rank"]] = []

    def __init__(self, port: int, rank: int, token: str = TOKEN, pid: int = NO_PROCESS, host: str = "here") -> None:
        self.connected.append(self)
        self.connection = socket.create_connection(("127.0.0.1", port), timeout=20)
        self.lines = self.connection.makefile("rb")
        self.send(Hello(rank, host, pid, token))

    def send(self, *messages: Message) -> None:
        for message in messages:
            self.connection.sendall(message.to_line())

    def receive(self, kind: type[Kind]) -> Kind:
        """Return the next message of this kind; fail if the monitor closes the connection instead."""
        for line in self.lines:
            message = parse_message(line)
            if isinstance(message, kind):
                return message
        raise AssertionError(f"no {kind.__name__}: the monitor has closed the connection")

    def leave(self) -> None:
        self.lines.close()
        self.connection.close()


@contextmanager
def started_monitors() -> Iterator[Callable[..., tuple["subprocess.Popen[str]", int]]]:
    """Yield a function that starts a monitor of so many ranks; at the end, close all connections and kill the monitors."""
    started: list[subprocess.Popen[str]] = []

    def start(world_size: int, hang_timeout_s: float | None = None) -> tuple["subprocess.Popen[str]", int]:
        process, port = start_monitor(MonitorSettings("127.0.0.1", "here", TOKEN, world_size, hang_timeout_s))
        started.append(process)
        return process, port

    try:
        yield start
    finally:
        while Rank.connected:
            Rank.connected.pop().leave()
        for process in started:
            process.kill()
            process.wait()
