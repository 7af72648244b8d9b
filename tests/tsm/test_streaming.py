"""The streaming form equals the offline past-only network, frame by frame, and traces with torch.export."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.official_reference import OnlineMobileNet, randomise
from tsm.networks import TemporalNetwork, build_network
from tsm.official import from_official
from tsm.streaming import Caches, StreamingNetwork, streaming_network

CLASSES, FRAMES = 5, 64
QUICK = ("resnet18", "mobilenet_v2")
SLOW = ("resnet34", "resnet50", "resnet101", "resnext50_32x4d")


pytestmark = pytest.mark.usefixtures("one_thread")


def past(backbone: str = "resnet18", frames: int = FRAMES, **changes: Any) -> TemporalNetwork:
    """Build a past-only network in float64 whose batch norms have the statistics of random clips, so that no signal dies."""
    torch.manual_seed(0)
    network = build_network(backbone, CLASSES, frames, direction="past", **changes).double()
    nn.init.normal_(network.classifier.weight, std=0.1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network.backbone(clips(1, frames).flatten(0, 1))
    return network.eval()


def clips(batch: int, frames: int = FRAMES, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, frames, 3, size, size, dtype=torch.float64, generator=generator)


@torch.no_grad()
def stream(network: StreamingNetwork, x_NTCHW: Tensor, caches: Caches | None = None) -> Tensor:
    """Stream clips frame by frame from zero caches, and return the logits of each frame, (N, T, K)."""
    caches = network.initial_caches(len(x_NTCHW)) if caches is None else caches
    logits = []
    for x_NCHW in x_NTCHW.unbind(1):
        logit_NK, caches = network.stream(x_NCHW, caches)
        logits.append(logit_NK)
    return torch.stack(logits, 1)


@torch.no_grad()
def offline(network: TemporalNetwork, x_NTCHW: Tensor) -> Tensor:
    """Compute the offline network's logits of each frame, (N, T, K)."""
    feature_BC: Tensor = network.backbone(x_NTCHW.flatten(0, 1))
    logit_NTK: Tensor = network.classifier(feature_BC.unflatten(0, (len(x_NTCHW), -1)))
    return logit_NTK


def error(actual: Tensor, expected: Tensor) -> float:
    return (actual - expected).abs().max().item()


# --- Equality ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_streaming_is_the_offline_network(backbone: str) -> None:
    """Over 64 frames of three streams, or of one of a large network; then the first 8 in another batch, of one or three."""
    network = past(backbone)
    streaming, x_NTCHW = streaming_network(network), clips(3)
    streams = 3 if backbone in QUICK else 1
    expected_NTK = offline(network, x_NTCHW[:streams])
    # Frames differ from each other, so that a cache of a wrong place or frame would show.
    assert expected_NTK.std(1).min().item() > 0.01
    assert error(stream(streaming, x_NTCHW[:streams]), expected_NTK) < 1e-10
    batch = 4 - streams
    logit_NTK = stream(streaming, x_NTCHW[:batch, :8])
    assert error(logit_NTK[:streams], expected_NTK[:batch, :8]) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "caches"),
    [({"shift": "block"}, 8), ({"fold_div": 3}, 8), ({"shift": "none"}, 0), ({"fold_div": 65}, 5)],
)
def test_other_shifts_stream_too(options: dict[str, Any], caches: int) -> None:
    """With fold_div=65 nothing moves before the three convolutions of 64 channels, which then have no cache."""
    network = past(frames=6, **options)
    streaming = streaming_network(network)
    logit_NTK = stream(streaming, clips(2, 6))
    assert error(logit_NTK, offline(network, clips(2, 6))) < 1e-10
    assert error(logit_NTK.mean(1), network(clips(2, 6))) < 1e-10
    assert len(streaming.initial_caches(1)) == caches


@torch.no_grad()
def test_the_official_online_network_to_each_frame() -> None:
    demo = randomise(OnlineMobileNet(CLASSES).double()).eval()
    assert isinstance(demo, OnlineMobileNet)
    network = build_network("mobilenet_v2", CLASSES, direction="past").double()
    network.load_state_dict(from_official(demo.state_dict()))
    their_caches: list[Tensor] | None = None
    streaming = streaming_network(network)
    caches = streaming.initial_caches(2)
    for x_NCHW in clips(2, 8).unbind(1):
        expected_NK, their_caches = demo.step(x_NCHW, their_caches)
        logit_NK, caches = streaming.stream(x_NCHW, caches)
        assert error(logit_NK, expected_NK) < 1e-10
        assert their_caches is not None
        assert [cache.shape for cache in caches] == [cache.shape for cache in their_caches]


def test_streams_of_a_batch_do_not_mix_and_may_take_turns() -> None:
    streaming = streaming_network(past())
    x_NTCHW = clips(2, 4)
    together_NTK = stream(streaming, x_NTCHW)
    caches = [streaming.initial_caches(1), streaming.initial_caches(1)]
    with torch.no_grad():
        for t in range(4):
            for n in range(2):
                logit_1K, caches[n] = streaming.stream(x_NTCHW[n : n + 1, t], caches[n])
                assert error(logit_1K, together_NTK[n : n + 1, t]) < 1e-10


def test_caches_carry_what_was_before() -> None:
    streaming = streaming_network(past())
    logit_NTK = stream(streaming, clips(1, 2))
    assert error(stream(streaming, clips(1, 2)[:, 1:])[:, 0], logit_NTK[:, 1]) > 1e-3


def test_it_is_a_copy_in_evaluation_mode_with_the_same_names() -> None:
    network = past(frames=4).train()
    streaming = streaming_network(network)
    assert not any(module.training for module in streaming.modules()) and network.training
    assert streaming.state_dict().keys() == network.state_dict().keys()
    before_NTK = stream(streaming, clips(1, 4))
    nn.init.zeros_(network.classifier.weight)
    network(clips(1, 4))
    assert torch.equal(stream(streaming, clips(1, 4)), before_NTK)
    assert torch.equal(stream(copy.deepcopy(streaming), clips(1, 4)), before_NTK)


# --- Caches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "count", "elements"),
    [("mobilenet_v2", 10, 27_048), ("resnet18", 8, 116_032), ("resnet50", 16, 702_464)],
)
def test_sizes_of_caches_at_224_pixels(backbone: str, count: int, elements: int) -> None:
    with torch.device("meta"):
        streaming = streaming_network(build_network(backbone, CLASSES, direction="past"))
    caches = streaming.initial_caches(3, (224, 224))
    assert len(caches) == len(streaming.cache_names) == count
    assert sum(cache.numel() for cache in caches) == 3 * elements


@torch.no_grad()
def test_initial_caches_of_a_frame_size_are_zeros_in_the_shapes_that_follow() -> None:
    streaming = streaming_network(past()).float()
    x_NCHW = clips(2, 1, 48)[:, 0].float()
    full, short = streaming.initial_caches(2, (48, 48)), streaming.initial_caches(2)
    assert all(cache.dtype == torch.float32 and not cache.any() for cache in (*full, *short))
    from_full, from_short = streaming.stream(x_NCHW, full), streaming.stream(x_NCHW, short)
    assert [cache.shape for cache in from_full[1]] == [cache.shape for cache in full]
    assert torch.equal(from_full[0], from_short[0])
    assert all(map(torch.equal, from_full[1], from_short[1]))


@torch.no_grad()
def test_a_cache_keeps_its_own_channels_only() -> None:
    streaming = streaming_network(past("mobilenet_v2"))
    _, caches = streaming.stream(clips(1, 1)[:, 0], streaming.initial_caches(1))
    assert all(cache.untyped_storage().nbytes() == 8 * cache.numel() for cache in caches)


@torch.no_grad()
def test_caches_keep_the_memory_format() -> None:
    """A cache in another format would make the concatenation, and what follows, change format at each shift."""
    streaming = streaming_network(past(fold_div=4)).to(memory_format=torch.channels_last)
    seen: list[Tensor] = []
    streaming.get_submodule("backbone.layer2.1.conv1").register_forward_hook(lambda _, args, out: seen.append(args[0]))
    caches = streaming.initial_caches(2)
    for x_NCHW in clips(2, 3).unbind(1):
        _, caches = streaming.stream(x_NCHW.contiguous(memory_format=torch.channels_last), caches)
    assert all(x_NCHW.is_contiguous(memory_format=torch.channels_last) for x_NCHW in seen[1:])


# --- Tracers ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2"])
def test_torch_export_with_any_number_of_streams(backbone: str) -> None:
    streaming = streaming_network(past(backbone))
    n = torch.export.Dim("n", min=1)
    caches = streaming.initial_caches(2, (16, 16))
    program = torch.export.export(
        streaming, (clips(2, 1)[:, 0], caches), dynamic_shapes=({0: n}, tuple({0: n} for _ in caches))
    )
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("cat" in name for name in names) == len(caches)
    assert not any(word in name for name in names for word in ("copy", "scatter", "clone", "expand"))
    exported = program.module()
    for batch in (1, 3):
        caches = streaming.initial_caches(batch, (16, 16))
        expected_NTK = stream(streaming, clips(batch, 3))
        for t, x_NCHW in enumerate(clips(batch, 3).unbind(1)):
            logit_NK, caches = exported(x_NCHW, caches)
            assert error(logit_NK, expected_NTK[:, t]) < 1e-10


@torch.no_grad()
def test_torch_compile_traces_it_whole() -> None:
    torch._dynamo.reset()
    streaming = streaming_network(past())
    compiled = torch.compile(streaming, fullgraph=True, backend="aot_eager")
    caches = streaming.initial_caches(1, (16, 16))
    expected_NTK = stream(streaming, clips(1, 3))
    for t, x_NCHW in enumerate(clips(1, 3).unbind(1)):
        logit_NK, caches = compiled(x_NCHW, caches)
        assert error(logit_NK, expected_NTK[:, t]) < 1e-10


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"direction": "both"}, r"layer1\.0\.conv1 shifts in direction 'both'.*later frame.*Fix:.*direction=past"),
        ({"temporal_pool": True}, r"pooling before backbone\.layer2.*later frame.*Fix:.*temporal_pool=false"),
        ({"backbone": "resnet50", "non_local": True}, r"attends to all frames.*Fix:.*non_local=false"),
    ],
)
def test_networks_that_need_later_frames_are_refused(options: dict[str, Any], reason: str) -> None:
    arguments: dict[str, Any] = {"backbone": "resnet18", "num_classes": CLASSES, "direction": "past"} | options
    with torch.device("meta"):
        network = build_network(**arguments)
    with pytest.raises(ValueError, match=reason):
        streaming_network(network)


def test_wrong_frames_and_caches_are_refused() -> None:
    streaming = streaming_network(past())
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\), got \(1, 2, 3, 16, 16\)"):
        streaming.stream(clips(1, 2), streaming.initial_caches(1))
    with pytest.raises(ValueError, match=r"8 caches, got 7.*Fix"):
        streaming.stream(clips(1, 1)[:, 0], streaming.initial_caches(1)[1:])
    # The failed call keeps no caches.
    with pytest.raises(RuntimeError):
        streaming.stream(clips(3, 1)[:, 0], streaming.initial_caches(1))
    assert stream(streaming, clips(1, 1)).isfinite().all()
