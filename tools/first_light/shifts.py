"""Replacements for `tsm.shift.temporal_shift`: the project's implementations, and others to compare with."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import tsm.networks
import tsm.shift
from benchmarks.shift import FUNCTIONS, ShiftFunction

WITHOUT_TRITON = "ours without Triton"

SHIFTS: dict[str, ShiftFunction] = {
    "ours": FUNCTIONS["ours"],
    WITHOUT_TRITON: FUNCTIONS["ours"],
    "authors' style": FUNCTIONS["naive"],
    "copy": FUNCTIONS["copy"],
    "none": FUNCTIONS["none"],
}


@contextmanager
def shift_replaced(name: str) -> Iterator[ShiftFunction]:
    """Replace the shift of all networks by SHIFTS[name], forward and backward, inside the context."""
    function = SHIFTS[name]
    with mock.patch.object(tsm.networks, "temporal_shift", function), without_triton(name == WITHOUT_TRITON):
        yield function


@contextmanager
def without_triton(really: bool = True) -> Iterator[None]:
    """Make `temporal_shift` use one copy per slice of channels inside the context, as on machines without Triton."""
    if not really:
        yield
        return
    with mock.patch.object(tsm.shift, "_fused_shift", return_value=None):
        yield
