"""The agreement on a last step: simulated ranks whose messages arrive in any order of ranks."""

import random
import threading
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed.health.messages import LastStep, LastStepAgreed, LastStepKnown, Message, StopRequest, StopWanted
from distributed.health.stop_agreement import StopAgreement, StopRelay


class Wire:
    """The connections of all ranks to one relay. Messages of a rank keep their order; across ranks any order may happen."""

    def __init__(self, world_size: int, seed: int) -> None:
        self._relay, self._random = StopRelay(), random.Random(seed)
        self._to_relay: list[deque[Message]] = [deque() for _ in range(world_size)]
        self._to_rank: list[deque[Message]] = [deque() for _ in range(world_size)]
        self.ranks = [StopAgreement(rank, self._to_relay[rank].append) for rank in range(world_size)]

    def deliver_one(self) -> bool:
        """Deliver the first message of a random queue; returns False when all queues are empty."""
        full = [queue for queue in (*self._to_relay, *self._to_rank) if queue]
        if not full:
            return False
        queue = self._random.choice(full)
        message = queue.popleft()
        for rank, (up, down) in enumerate(zip(self._to_relay, self._to_rank, strict=True)):
            if queue is up:
                for receiver, reply in self._relay.replies(rank, message, set(range(len(self.ranks)))):
                    self._to_rank[receiver].append(reply)
            elif queue is down:
                self.ranks[rank].receive(message)
        return True


@settings(max_examples=40)
@given(st.integers(2, 6), st.integers(0, 3), st.integers(0, 2**32), st.sets(st.integers(0, 5), min_size=1))
def test_all_ranks_stop_after_the_same_step_for_the_same_reason(
    world_size: int, in_flight: int, seed: int, asking: set[int]
) -> None:
    """Rank 0 takes its step before the others, as far ahead as its device allows; the thread delivers while it waits."""
    wire, stopped = Wire(world_size, seed), {}
    over = threading.Event()

    def deliver() -> None:
        while not over.is_set():
            if not wire.deliver_one():
                over.wait(0.0001)

    thread = threading.Thread(target=deliver)
    thread.start()
    try:
        for step in range(100_000):
            for rank, agreement in enumerate(wire.ranks):
                if rank in stopped:
                    continue
                if step >= 2 and rank in asking:
                    agreement.request(f"SIGNAL{rank}")
                if (reason := agreement.reason_after(step, in_flight)) is not None:
                    stopped[rank] = (step, reason)
            if len(stopped) == world_size or not asking & set(range(world_size)):
                break
    finally:
        over.set()
        thread.join()
    if asking & set(range(world_size)):
        assert len(stopped) == world_size and len(set(stopped.values())) == 1
        ((step, reason),) = set(stopped.values())
        assert step > 2 + in_flight and int(reason.removeprefix("SIGNAL")) in asking


def test_only_the_first_reason_and_the_first_last_step_are_relayed() -> None:
    relay, both = StopRelay(), {0, 1}
    assert relay.replies(1, StopRequest("SIGTERM"), both) == [(0, StopWanted("SIGTERM")), (1, StopWanted("SIGTERM"))]
    assert relay.replies(0, StopRequest("SIGINT"), both) == []
    assert relay.replies(1, LastStep(999), both) == []
    assert relay.replies(0, LastStep(7), both) == [(0, LastStep(7)), (1, LastStep(7))]
    assert relay.replies(0, LastStep(8), both) == []
    assert relay.replies(0, LastStepKnown(), both) == []
    assert relay.replies(1, LastStepKnown(), both) == [(0, LastStepAgreed())]
    assert relay.replies(1, LastStepKnown(), both) == []


def test_rank_0_begins_no_step_before_all_ranks_know_the_last_one() -> None:
    sent: list[Message] = []
    agreement = StopAgreement(0, sent.append)
    agreement.receive(StopWanted("SIGUSR1"))
    waiting = threading.Thread(target=agreement.reason_after, args=(5, 2), daemon=True)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive() and sent == [LastStep(8)]
    agreement.receive(LastStep(8))
    agreement.receive(LastStepAgreed())
    waiting.join(10)
    assert not waiting.is_alive()
    assert [agreement.reason_after(step, 2) for step in (6, 7, 8, 9)] == [None, None, "SIGUSR1", "SIGUSR1"]


@pytest.mark.parametrize("message", [StopWanted("SIGUSR1"), LastStep(3)])
def test_a_rank_does_not_stop_by_half_of_the_agreement(message: Message) -> None:
    agreement = StopAgreement(1, lambda _: None)
    agreement.receive(message)
    assert agreement.reason_after(2, 0) is None
