"""Objects between ranks: JSON in a tensor of bytes. A rank never unpickles what it receives, because that can run code.

Floats arrive as they were, to the bit, also NaN and the infinities, which Python's JSON has.
"""

import json
from typing import Any

import torch
from torch import Tensor

from .base import Backend


def encode(value: Any) -> Tensor:
    """Return the JSON text of a value, uint8. Raises TypeError for a value that would not arrive as it is: only None, bool,
    int, float, str, and lists and dicts (with keys of type str) of them do. Convert dataclasses and tuples before."""
    text = json.dumps(value)
    # Tuples would become lists, and keys strings. NaN differs from itself; its text does not.
    if repr(json.loads(text)) != repr(value):
        raise TypeError(f"JSON does not hold {value!r} as it is")
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def decode(text: Tensor) -> Any:
    """Return the value of `encode`'s text. Raises ValueError for anything else."""
    return json.loads(text.numpy().tobytes())


def broadcast_json(backend: Backend, value: Any) -> Any:
    """Return rank 0's value, by two broadcasts: the length, then the text."""
    is_source = backend.topology.rank == 0
    text = encode(value) if is_source else torch.empty(0, dtype=torch.uint8)
    length = torch.tensor([len(text)])
    backend.broadcast_(length, "object.length")
    if not is_source:
        text = torch.empty(int(length), dtype=torch.uint8)
    backend.broadcast_(text, "object.text")
    return decode(text)
