"""The messages between the ranks of a job and its monitor: one dataclass per kind, one line of JSON per message.

A line is `{"kind": CLASS_NAME, FIELD: VALUE, ...}`. This is the only file that knows the format.
"""

import json
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

from .hang_detection import Place

FAILURE_CHARACTERS = 1 << 16
"""Of a rank's failure, at most: the monitor sends it to all ranks."""


@dataclass(frozen=True)
class Failure:
    """The reason why a job ends early: `rank R on HOST MESSAGE`."""

    rank: int
    host: str
    message: str
    exit_code: int

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} {self.message}"


class MessageError(ValueError):
    """A line that is not a message: not JSON, or with fields that its kind does not have."""


class Message:
    """Base class of all messages."""

    def to_line(self) -> bytes:
        return json.dumps({"kind": type(self).__name__, **vars(self)}).encode() + b"\n"


# --- From a rank to the monitor ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hello(Message):
    """The first message of every rank; `token` proves that it belongs to this job."""

    rank: int
    host: str
    pid: int
    token: str


@dataclass(frozen=True)
class OpenLog(Message):
    """The run folder is known: the monitor writes its log there. `lock`: as in RankLog.open_in."""

    folder: str
    lock: str


@dataclass(frozen=True)
class Heartbeat(Message):
    """The rank's place, sent at a fixed interval; the monitor answers with an Ack."""

    step: int
    phase: str
    progress_count: int

    def place(self) -> Place:
        """Raises MessageError for an unknown phase."""
        try:
            return Place(self.step, self.phase, self.progress_count)
        except ValueError as error:
            raise MessageError(str(error)) from None


@dataclass(frozen=True)
class RankFailed(Message):
    """An error ends this rank."""

    message: str
    exit_code: int


@dataclass(frozen=True)
class Stacks(Message):
    """The answer to StacksRequest: this rank's stacks, and those of other ranks on its node.

    `storage_waits`: of these ranks, those that wait for storage, with stack_dump's clause that says so.
    """

    own: str
    neighbours: dict[int, str]
    storage_waits: dict[int, str]


@dataclass(frozen=True)
class LogTail(Message):
    """The end of the log of a rank: the sender, or one on its node that cannot send."""

    rank: int
    text: str


@dataclass(frozen=True)
class RankDone(Message):
    """This rank has finished without an error."""


@dataclass(frozen=True)
class StopRequest(Message):
    """This rank asks all ranks to stop after a common step; `reason`: the signal that it got."""

    reason: str


@dataclass(frozen=True)
class LastStep(Message):
    """The step after which all ranks stop: from rank 0 to the monitor, which sends it to all ranks."""

    step: int


@dataclass(frozen=True)
class LastStepKnown(Message):
    """The answer to LastStep."""


# --- From the monitor to a rank ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ack(Message):
    """The answer to a heartbeat: the monitor is alive."""


@dataclass(frozen=True)
class StacksRequest(Message):
    """Asks for the stacks of the receiver, and of processes on its node: rank -> process id."""

    neighbours: dict[int, int]


@dataclass(frozen=True)
class JobFailed(Message):
    """The job ends because of this failure.

    `send_log`: the failed rank cannot send its log and is on another node than the monitor, so ranks on its node send it.
    """

    rank: int
    host: str
    message: str
    exit_code: int
    send_log: bool

    def failure(self) -> Failure:
        return Failure(self.rank, self.host, self.message, self.exit_code)


@dataclass(frozen=True)
class StopWanted(Message):
    """A rank has asked for a stop; `reason`: the first rank's, which counts on all ranks."""

    reason: str


@dataclass(frozen=True)
class LastStepAgreed(Message):
    """All ranks know the last step: rank 0 may begin its next step."""


@dataclass(frozen=True)
class JobDone(Message):
    """All ranks have finished or failed."""


_KINDS: dict[str, type[Message]] = {
    kind.__name__: kind
    for kind in (
        *(Hello, OpenLog, Heartbeat, RankFailed, Stacks, LogTail, RankDone, StopRequest, LastStepKnown),
        *(Ack, StacksRequest, JobFailed, JobDone, StopWanted, LastStepAgreed),
        LastStep,
    )
}


def parse_message(line: bytes) -> Message | None:
    """Return the message of a line, or None for an unknown kind. Raises MessageError for a malformed line."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise MessageError(f"not an object: {line[:100]!r}")
    kind = _KINDS.get(str(fields.pop("kind", None)))
    if kind is None:
        return None
    types = get_type_hints(kind)
    if types.keys() != fields.keys():
        raise MessageError(f"{kind.__name__} with fields {sorted(fields)}")
    return kind(**{name: _checked(name, fields[name], wanted) for name, wanted in types.items()})


def _checked(name: str, value: Any, wanted: Any) -> Any:
    """Return a field's value if it has the wanted type; JSON's keys, which are strings, become the type's keys."""
    if get_origin(wanted) is dict and isinstance(value, dict):
        key_type, value_type = get_args(wanted)
        try:
            return {key_type(key): _checked(name, each, value_type) for key, each in value.items()}
        except ValueError as error:
            raise MessageError(f"{name}: {error}") from None
    if type(value) is not wanted:
        raise MessageError(f"{name}={value!r} is not {wanted}")
    return value
