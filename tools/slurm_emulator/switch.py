"""Emulate a network switch with delay, on kernels without netem, for the emulated cluster only.

    switch.py --delay-us 500 --rate-mbit 1000 --pid-file FILE NAMESPACE:INTERFACE:ADDRESS/PREFIX ...

Creates a TAP interface in each network namespace (empty: the current one) and forwards Ethernet frames between them with a one-way
delay. Each port sends at most `rate`; frames beyond a queue of 50 ms are dropped. Once all interfaces are up, it continues in the
background.
"""

import argparse
import ctypes
import fcntl
import heapq
import os
import select
import struct
import subprocess
import time
from contextlib import suppress
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_MTU_BYTES = 9000
_LONGEST_FRAME_BYTES = 1 << 16
_QUEUE_S = 0.05
# Read at most this many frames from one port before the next port's turn.
_FRAMES_PER_TURN = 64


def open_port(namespace: str, interface: str, address: str) -> int:
    """Create a TAP interface in the namespace, set it up, and return its descriptor, which reads and writes its frames."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    if namespace:
        _enter(libc, Path("/run/netns") / namespace)
    port = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(port, _TUNSETIFF, struct.pack("16sH22s", interface.encode(), _IFF_TAP | _IFF_NO_PI, b""))
    subprocess.run(["ip", "addr", "add", address, "dev", interface], check=True)
    subprocess.run(["ip", "link", "set", interface, "mtu", str(_MTU_BYTES), "up"], check=True)
    _enter(libc, Path(f"/proc/self/fd/{home}"))
    os.close(home)
    return port


def _enter(libc: ctypes.CDLL, namespace: Path) -> None:
    descriptor = os.open(namespace, os.O_RDONLY)
    if libc.setns(descriptor, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    os.close(descriptor)


def forward(ports: list[int], delay_s: float, bytes_per_s: float) -> None:
    """Forward frames forever. `bytes_per_s` 0: no rate limit."""
    # Ethernet address -> the port that last sent from it.
    port_of: dict[bytes, int] = {}
    # Port -> the time when its send queue is empty.
    free_s = dict.fromkeys(ports, 0.0)
    # A heap of (due time, sequence number, port, frame).
    waiting: list[tuple[float, int, int, bytes]] = []
    count = 0
    while True:
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, out, frame = heapq.heappop(waiting)
            _write(out, frame)
        # select's timeout has microseconds, epoll's only milliseconds.
        until_due_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for port in select.select(ports, [], [], until_due_s)[0]:
            for _ in range(_FRAMES_PER_TURN):
                try:
                    frame = os.read(port, _LONGEST_FRAME_BYTES)
                except OSError:
                    # No more frames for now, or the interface is down because its node crashed.
                    break
                sent_s = time.monotonic()
                target, source = frame[0:6], frame[6:12]
                port_of[source] = port
                if bytes_per_s:
                    if free_s[port] - sent_s > _QUEUE_S:
                        continue
                    sent_s = max(sent_s, free_s[port]) + len(frame) / bytes_per_s
                    free_s[port] = sent_s
                known = port_of.get(target)
                for out in [known] if known is not None else [each for each in ports if each != port]:
                    count += 1
                    heapq.heappush(waiting, (sent_s + delay_s, count, out, frame))


def _write(port: int, frame: bytes) -> None:
    # A network may drop a frame.
    with suppress(OSError):
        os.write(port, frame)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay-us", type=float, required=True)
    parser.add_argument("--rate-mbit", type=float, default=0.0, help="0: no limit")
    parser.add_argument("--pid-file", type=Path, required=True)
    parser.add_argument("ports", nargs="+", metavar="NAMESPACE:INTERFACE:ADDRESS/PREFIX")
    options = parser.parse_args()
    ports = [open_port(*port.split(":")) for port in options.ports]
    if os.fork():
        # The child keeps the interfaces.
        os._exit(0)
    os.setsid()
    options.pid_file.write_text(f"{os.getpid()}\n")
    forward(ports, options.delay_us * 1e-6, options.rate_mbit * 1e6 / 8)


if __name__ == "__main__":
    main()
