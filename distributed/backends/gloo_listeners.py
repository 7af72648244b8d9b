"""Refuse connections to Gloo's listening sockets once all ranks of a group are connected.

Gloo keeps these sockets open as long as the group, checks no one who connects, and aborts the process when `accept` fails. So any
user who reaches the address could end a job: a few thousand connections use up a rank's open files.
"""

import ctypes
import os
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SO_ATTACH_FILTER = 26

# A filter of one instruction, BPF_RET | BPF_K: keep 0 bytes of every packet. Closing the sockets instead would abort Gloo.
_DROP_ALL = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0), 8)


@contextmanager
def sealed_afterwards() -> Iterator[None]:
    """Create a group of ranks within this; afterwards the kernel drops all new connections to the group's listening sockets."""
    before = set(_listening_descriptors())
    yield
    for descriptor in set(_listening_descriptors()) - before:
        with _opened(descriptor) as listener:
            # torch's store listens on all addresses, and ranks may connect to it later.
            if listener.getsockname()[0] not in ("0.0.0.0", "::"):
                program = struct.pack("HL", 1, ctypes.addressof(_DROP_ALL))
                # Some sandboxes have no packet filters.
                with suppress(OSError):
                    listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


def _listening_descriptors() -> Iterator[int]:
    for entry in list(Path("/proc/self/fd").iterdir()):
        # Another thread may close it meanwhile.
        with suppress(OSError):
            if not stat.S_ISSOCK(entry.stat().st_mode):
                continue
            with _opened(int(entry.name)) as each:
                is_listening = each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                if is_listening and each.family in (socket.AF_INET, socket.AF_INET6):
                    yield int(entry.name)


def _opened(descriptor: int) -> socket.socket:
    """Return a second descriptor of a socket, which the caller closes."""
    return socket.socket(fileno=os.dup(descriptor))
