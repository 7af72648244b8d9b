"""Objects between ranks: JSON values arrive as they were sent, anything else is refused, and a pickle is never executed."""

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distributed.backends.objects import decode, encode

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES)
def test_a_value_arrives_as_it_was_sent(value: Any) -> None:
    text = encode(value)
    assert text.dtype == torch.uint8 and len(text) > 0
    # repr tells 1 from True and 0.0 from -0.0.
    assert repr(decode(text)) == repr(value)


def test_floats_that_are_no_numbers_and_names_that_are_no_text_arrive_too() -> None:
    values = [math.nan, math.inf, -math.inf, b"\xff.mp4".decode(errors="surrogateescape")]
    assert repr(decode(encode(values))) == repr(values)


@pytest.mark.parametrize("value", [(1, 2), {1: "a"}, {"a": [(1,)]}, {1}, b"a", torch.ones(1), Path()], ids=repr)
def test_a_value_that_would_not_arrive_as_it_is_is_refused(value: Any) -> None:
    with pytest.raises(TypeError):
        encode(value)


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_and_not_executed(tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        sent = torch.frombuffer(bytearray(pickle.dumps(Evil(proof), protocol)), dtype=torch.uint8)
        with pytest.raises(ValueError, match=r"Expecting value|codec can't decode"):
            decode(sent)
    assert not proof.exists()
    pickle.loads(pickle.dumps(Evil(proof)))
    assert proof.exists()
