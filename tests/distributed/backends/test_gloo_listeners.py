"""Gloo's listening sockets after all ranks are connected: connections that are open stay, new ones are dropped."""

import socket
from pathlib import Path

import pytest

from distributed.backends.gloo_listeners import sealed_afterwards


def connected(listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    client = socket.create_connection(("127.0.0.1", listener.getsockname()[1]), timeout=20)
    server, _ = listener.accept()
    server.settimeout(20)
    return client, server


def test_only_what_was_opened_within_and_on_one_address_is_sealed() -> None:
    before = socket.create_server(("127.0.0.1", 0))
    with sealed_afterwards():
        gloo, store = socket.create_server(("127.0.0.1", 0)), socket.create_server(("0.0.0.0", 0))
        client, server = connected(gloo)
    client.sendall(b"to")
    server.sendall(b"fro")
    assert (server.recv(9), client.recv(9)) == (b"to", b"fro")
    for open_listener in (before, store):
        for each in connected(open_listener):
            each.close()
    with pytest.raises(TimeoutError):
        socket.create_connection(gloo.getsockname(), timeout=0.3)
    for each in (before, gloo, store, client, server):
        each.close()


def test_no_descriptor_is_left() -> None:
    def opened() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    with socket.create_server(("127.0.0.1", 0)):
        before = opened()
        for _ in range(3):
            with sealed_afterwards(), socket.create_server(("127.0.0.1", 0)):
                pass
        assert opened() == before
