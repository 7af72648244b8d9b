"""The kernel's errors for a file server or a network that fails: they say nothing about a file, or about the program."""

import errno

SERVER_FAULTS = frozenset(
    getattr(errno, name)
    for name in (
        "EIO ESTALE EREMOTEIO ETIMEDOUT ENOTCONN ECONNRESET ECONNABORTED ECONNREFUSED EHOSTUNREACH EHOSTDOWN ENETUNREACH ENETDOWN"
    ).split()
)
