"""Counters of the fake GPU in this process."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

COUNTERS = (
    "kernels", "convolutions", "batch_norms", "matrix_products", "collectives", "copies_to_device", "copies_to_host",
    "copies_on_device", "pageable_copies", "memsets", "stream_waits", "event_waits", "spinning_waits", "graph_launches",
)  # fmt: skip
WAITS = ("pageable_copies", "stream_waits", "event_waits", "spinning_waits")
"""Counters of calls in which the host waits for the device."""


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.fake_gpu_count.argtypes = [ctypes.c_char_p]
    library.fake_gpu_count.restype = ctypes.c_long
    library.fake_gpu_write_kernels.argtypes = [ctypes.c_char_p]
    return library


def is_loaded() -> bool:
    """Return whether this process runs on the fake GPU (tests/fake_gpu/run.sh)."""
    return hasattr(ctypes.CDLL(None), "fake_gpu_count")


def counts() -> dict[str, int]:
    """Return all counters since the process started or since `counted` began."""
    return {name: _library().fake_gpu_count(name.encode()) for name in COUNTERS}


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Reset the counters for a `with` block; the dict is filled when the block ends."""
    _library().fake_gpu_reset()
    found: dict[str, int] = {}
    yield found
    found |= counts()


def kernels_by_name() -> dict[str, int]:
    """Return the number of launches of each of torch's kernels, by mangled name."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernels"
        _library().fake_gpu_write_kernels(str(path).encode())
        lines = [line.split("\t", 1) for line in path.read_text().splitlines()]
    return {name: int(count) for count, name in lines}


def calls(found: dict[str, int]) -> int:
    """Count all operations that the host started on the device: launches, library calls, copies and memsets."""
    started = ("kernels", "convolutions", "batch_norms", "matrix_products", "collectives", "memsets")
    return sum(found[name] for name in (*started, "copies_to_device", "copies_to_host", "copies_on_device"))
