"""The comparison of int8 answers with PyTorch's. test_export.py has the files themselves."""

import pytest
import torch
from torch import Tensor

from training.deploy.export.check import random_video
from training.deploy.export.forms import exportable
from training.deploy.export.int8 import Agreement, _Answers
from tsm.networks import build_network

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("carried", [True, False])
def test_int8_is_judged_as_the_network_was_trained(carried: bool) -> None:
    """On a stream no clip begins with caches of zeros: another one comes first, and a smaller batch keeps its own."""
    network = exportable(build_network("resnet18", 3, 4, direction="past"), "stream", 32)
    calls: list[list[Tensor]] = []

    def run(inputs: list[Tensor]) -> list[Tensor]:
        calls.append([*inputs, *network.run(inputs)])
        return calls[-1][len(inputs) :]

    answers, clips_NTCHW = _Answers(network, run, carried), random_video(2, 4, 32, seed=3)
    assert [len(answers(each)) for each in (clips_NTCHW, clips_NTCHW[:1], clips_NTCHW)] == [2, 1, 2]
    # Clips before the first ones, then the three batches.
    starts = [0, 4, 8, 12] if carried else [0, 4, 8]
    assert len(calls) == starts[-1] + 4
    assert torch.equal(calls[0][0], clips_NTCHW[:, 0].flip(0) if carried else clips_NTCHW[:, 0])
    # Of the first stream; inputs are the frame and 8 caches, outputs the logits and 8 caches.
    for start in starts[1:]:
        for cache, before in zip(calls[start][1:9], calls[start - 1][10:], strict=True):
            assert torch.equal(cache[:1], before[:1]) if carried else not cache.any()


def test_int8_may_lose_half_a_point_and_change_one_answer_in_a_hundred() -> None:
    for agreement, top1, good in ((100, 80, True), (99, 79.5, True), (98.9, 80, False), (99.5, 79.4, False)):
        assert Agreement(1000, agreement, top1, fp32_top1_percent=80).good is good
