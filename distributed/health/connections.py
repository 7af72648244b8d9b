"""The monitor's connections: accepts ranks that know the job's token, and limits what anyone else can use up."""

import hmac
import selectors
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from .hang_detection import Place, RankState
from .messages import Hello, Message, MessageError, parse_message
from .monitor_process import SPARE_CONNECTIONS

# Before a connection has proved that it is a rank's.
_HELLO_TIMEOUT_S = 10.0
_HELLO_BYTES = 4096

# Stacks of a rank with many threads, and of its neighbours, are the largest lines.
_LINE_BYTES = 32 << 20

# Unsent bytes of a rank that does not read. The longest message is a failure's, a few times FAILURE_CHARACTERS.
_UNSENT_BYTES = 4 << 20


@dataclass
class Peer:
    """A rank's connection, and the state that the rank has sent."""

    connection: socket.socket
    rank: int = -1
    host: str = "?"
    pid: int = 0
    state: RankState = field(default_factory=lambda: RankState(Place(), time.monotonic(), time.monotonic()))
    leaving: bool = False
    """The rank has finished or failed: the end of its connection is expected."""
    stacks: str | None = None
    connected_s: float = field(default_factory=time.monotonic)
    buffer: bytearray = field(default_factory=bytearray)
    """The start of a line, whose end has not been received."""
    unsent: bytearray = field(default_factory=bytearray)
    """What the kernel has not taken yet, because the rank reads slowly or its node is lost."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"

    def add(self, part: bytes) -> list[bytes]:
        """Add received bytes, and return the lines that they end."""
        # Only the new part can have the end of a line.
        if b"\n" not in part:
            self.buffer += part
            lines = []
        else:
            first, *others, rest = part.split(b"\n")
            lines = [bytes(self.buffer + first), *others]
            self.buffer = bytearray(rest)
        return lines


class Connections:
    """The monitor's listening socket and all connections. Only ranks appear in `ranks`."""

    def __init__(self, address: str, token: str, world_size: int) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, 0), family=family, backlog=4096)
        # Another process of the node may have taken the connection back before `accept`.
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._token, self._world_size = token, world_size
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self.ranks: dict[int, Peer] = {}
        self.num_connected = 0
        """Ranks that have connected so far, also those that have left."""
        self._strangers: dict[socket.socket, Peer] = {}
        """Connections that have not sent the token yet, the oldest first."""

    def receive(self, wait_s: float) -> Iterator[tuple[Peer, Message | None]]:
        """Wait for messages, and yield each with its rank; None: the rank's connection has ended, and is closed."""
        for key, events in self._selector.select(wait_s):
            if key.fileobj is self._listener:
                self._accept()
                continue
            if events & selectors.EVENT_WRITE:
                self._flush(key.data)
            if events & selectors.EVENT_READ and key.data.connection.fileno() >= 0:
                yield from self._read(key.data)
        now_s = time.monotonic()
        for stranger in list(self._strangers.values()):
            if now_s - stranger.connected_s <= _HELLO_TIMEOUT_S:
                break
            self.close(stranger)

    def send(self, peer: Peer, message: Message) -> None:
        """Send a message to a rank without waiting for the rank; `receive` sends the rest of what the kernel does not take."""
        peer.unsent += message.to_line()
        self._flush(peer)
        if len(peer.unsent) > _UNSENT_BYTES:
            # A part of a line must not reach the rank: `receive` then finds the end of the connection.
            with suppress(OSError):
                peer.connection.shutdown(socket.SHUT_RDWR)

    def _flush(self, peer: Peer) -> None:
        try:
            del peer.unsent[: peer.connection.send(peer.unsent)]
        except BlockingIOError:
            pass
        except OSError:
            # `receive` notices a connection that has ended.
            peer.unsent.clear()
        with suppress(KeyError, ValueError):
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.unsent else 0)
            self._selector.modify(peer.connection, events, peer)

    def close(self, peer: Peer) -> bool:
        """Close a connection; returns whether it was a rank's."""
        with suppress(KeyError, ValueError):
            self._selector.unregister(peer.connection)
        self._strangers.pop(peer.connection, None)
        peer.connection.close()
        return self.ranks.pop(peer.rank, None) is not None

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            # Gone already, or too many open files: make room for the next one.
            self._close_oldest_stranger()
            return
        connection.setblocking(False)
        if len(self._strangers) >= self._world_size + SPARE_CONNECTIONS:
            self._close_oldest_stranger()
        self._strangers[connection] = peer = Peer(connection)
        self._selector.register(connection, selectors.EVENT_READ, peer)

    def _close_oldest_stranger(self) -> None:
        if self._strangers:
            self.close(next(iter(self._strangers.values())))

    def _read(self, peer: Peer) -> Iterator[tuple[Peer, Message | None]]:
        try:
            part = peer.connection.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            part = b""
        try:
            for line in peer.add(part):
                message = parse_message(line)
                if peer.rank < 0:
                    self._greet(peer, message)
                elif message is not None:
                    yield peer, message
                if peer.connection.fileno() < 0:
                    return
            # After the lines: a rank's first message may have come in one part with its hello.
            if len(peer.buffer) > (_HELLO_BYTES if peer.rank < 0 else _LINE_BYTES):
                raise MessageError(f"a line of more than {len(peer.buffer)} bytes")
        # No bytes from outside end the monitor: the peer is no rank of this job, or a broken one.
        except Exception:
            part = b""
        if not part and self.close(peer):
            yield peer, None

    def _greet(self, peer: Peer, message: Message | None) -> None:
        """Make a connection a rank's. Raises PermissionError for one that is no rank of this job."""
        if not isinstance(message, Hello) or not _same_text(message.token, self._token):
            raise PermissionError
        # The monitor kills a rank that does not exit: process ids below 1 stand for groups of processes.
        if not 0 <= message.rank < self._world_size or message.rank in self.ranks or message.pid < 1:
            raise PermissionError
        peer.rank, peer.host, peer.pid = message.rank, message.host, message.pid
        del self._strangers[peer.connection]
        self.ranks[peer.rank] = peer
        self.num_connected += 1


def _same_text(given: str, expected: str) -> bool:
    """Compare in a time that does not depend on where the texts differ."""
    return hmac.compare_digest(given.encode(errors="replace"), expected.encode())
