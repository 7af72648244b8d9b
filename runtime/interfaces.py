"""Addresses of this host's network interfaces, by getifaddrs(3): the standard library lists only the names."""

import ctypes
import os
import socket
from collections.abc import Iterator


class _InterfaceAddress(ctypes.Structure):
    """The first fields of `struct ifaddrs`."""


_InterfaceAddress._fields_ = [
    ("next", ctypes.POINTER(_InterfaceAddress)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
]

# Where the address begins in sockaddr_in and sockaddr_in6, and its length.
_PLACE = {socket.AF_INET: (4, 4), socket.AF_INET6: (8, 16)}


def interface_addresses() -> list[tuple[str, str]]:
    """Return (interface, address) of every IPv4 and IPv6 address, IPv6 without link-local ones."""
    libc = ctypes.CDLL(None, use_errno=True)
    first = ctypes.POINTER(_InterfaceAddress)()
    if libc.getifaddrs(ctypes.byref(first)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"getifaddrs: {os.strerror(number)}")
    try:
        return list(_addresses(first))
    finally:
        libc.freeifaddrs(first)


def _addresses(each: "ctypes._Pointer[_InterfaceAddress]") -> Iterator[tuple[str, str]]:
    while each:
        entry = each.contents
        # An interface without addresses has none here.
        family = ctypes.c_ushort.from_address(entry.address).value if entry.address else 0
        if family in _PLACE:
            start, length = _PLACE[socket.AddressFamily(family)]
            address = socket.inet_ntop(family, ctypes.string_at(entry.address + start, length))
            if not address.startswith("fe80:"):
                yield entry.name.decode(), address
        each = entry.next
