"""Evaluation of a small network on real clips: logits of every clip computed by hand, on one rank and on several."""

import copy
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distributed.backends.base import Group
from distributed.backends.single import SingleBackend
from distributed.batch_norm.layer import convert_batch_norm
from distributed.topology import Topology
from pipelines.decoding.decode import decode_clip
from pipelines.loading.clips import ClipSource, EvaluationClips
from pipelines.loading.worker_loader import ClipLoader
from pipelines.manifest import write_manifest
from pipelines.stream.eval_views import EvalProtocol
from pipelines.stream.mirror_labels import find_mirror
from tests.helpers.clips import write_clips
from training.build.normalise import Normaliser
from training.config.schema import Config, EvaluationConfig, NumericsConfig
from training.evaluation.evaluate import describe_mirrored_views, evaluate
from training.evaluation.metrics import ClipLogits, Scores, scores_of
from training.evaluation.validate import _recompute_statistics
from tsm.networks import build_network

# At a size of 35, frames with a shorter side of 40 need no scaling.
CLIPS, FRAMES, SIZE = 5, 12, 35
CPU = torch.device("cpu")
CENTRE = EvalProtocol(4, SIZE, "uniform")


class OneOf(SingleBackend):
    """Rank `rank` of a world without reduction: the test sums the ranks' parts itself."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(Topology("none", rank, size, rank, size, 0, "host"), CPU)
        self.reduced: list[str] = []

    def all_reduce_(self, x: Tensor, name: str, group: Group | None = None) -> None:
        self.reduced.append(name)

    def broadcast_object(self, value: Any) -> Any:
        # Only rank 0 computes scores, and the tests read no others.
        return vars(Scores(0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, None)) if value is None else super().broadcast_object(value)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five clips of noise and colour in three classes, two of them portrait."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    videos = []
    for index in range(CLIPS):
        height, width = (40, 56) if index % 2 == 0 else (56, 40)
        video_THWC = rng.integers(0, 128, (FRAMES, height, width, 3)) + rng.integers(0, 128, (FRAMES, 1, 1, 3))
        videos.append(video_THWC.astype(np.uint8))
    write_clips(folder / "val.arrow", videos)
    return folder


class Small(nn.Module):
    """Network that is sensitive to the order of frames, to mirroring and to the mode of batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 5, stride=3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(1))
        self.classifier = nn.LazyLinear(3)

    def forward(self, video_NTCHW: Tensor) -> Tensor:
        feature_BF = self.features(video_NTCHW.flatten(0, 1))
        logit_NK: Tensor = self.classifier(feature_BF.unflatten(0, video_NTCHW.shape[:2]).flatten(1))
        return logit_NK


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    network = Small().double()
    with torch.no_grad():
        network(2 + 3 * torch.randn(4, 4, 3, SIZE, SIZE, dtype=torch.float64))
    return network


@pytest.fixture(scope="module")
def normalise() -> Normaliser:
    return Normaliser(CPU, NumericsConfig(dtype="float64"))


class Noting(nn.Module):
    """Wrapper that records how many views the network gets at once."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.taken: list[int] = []

    def forward(self, video_NTCHW: Tensor) -> Tensor:
        self.taken.append(len(video_NTCHW))
        return self.network(video_NTCHW)


def run(
    folder: Path,
    network: nn.Module,
    normalise: Normaliser,
    protocol: EvalProtocol,
    batch: int,
    rank: int = 0,
    size: int = 1,
    amp: str = "off",
) -> tuple[ClipLogits, list[int]]:
    """Logits that a rank computes, and the rows of the clips that it could not decode."""
    clips = EvaluationClips(ClipSource(folder / "val.arrow", "pyav"), protocol)
    backend = OneOf(rank, size)
    settings = EvaluationConfig(batch=batch, amp=amp)
    evaluation = evaluate(network, normalise, clips, ClipLoader(clips, 0, 2), backend, settings)
    assert backend.reduced == ["evaluation.stop_wanted", "evaluation.logits", "evaluation.seen"]
    return evaluation.clip_logits, [record.row for record in evaluation.missing]


def by_hand(folder: Path, network: nn.Module, row: int, views: list[tuple[list[int], int, int, bool]]) -> Tensor:
    """Mean of a clip's logits over views, computed one view at a time from `(frames, left, top, mirrored)`; (K,)."""
    entry = ClipSource(folder / "val.arrow", "pyav").manifest.row(row)
    mean_C = torch.tensor([123.675, 116.28, 103.53], dtype=torch.float64).view(3, 1, 1)
    std_C = torch.tensor([58.395, 57.12, 57.375], dtype=torch.float64).view(3, 1, 1)
    network.eval()
    logits = []
    for frames, left, top, mirrored in views:
        video_TCHW = decode_clip("pyav", folder, entry, np.array(frames))[..., top : top + SIZE, left : left + SIZE]
        video_TCHW = video_TCHW.flip(-1) if mirrored else video_TCHW
        with torch.no_grad():
            logits.append(network(((video_TCHW.double() - mean_C) / std_C)[None])[0])
    return torch.stack(logits).mean(0)


MIDDLE, FIRST = [1, 4, 7, 10], [0, 3, 6, 9]


def test_logits_are_those_of_one_clip_at_a_time(made: Path, network: nn.Module, normalise: Normaliser) -> None:
    found, missing = run(made, network, normalise, CENTRE, batch=2)
    assert missing == []
    assert found.seen_N.all()
    assert found.label_N.tolist() == [0, 1, 2, 0, 1]
    for row in range(CLIPS):
        centre = (MIDDLE, 10, 2, False) if row % 2 == 0 else (MIDDLE, 2, 10, False)
        torch.testing.assert_close(found.logit_NK[row], by_hand(made, network, row, [centre]))
    expected = found.logit_NK.argmax(1) == found.label_N
    assert scores_of(found, None).top1_percent == pytest.approx(100 * expected.double().mean().item())


def test_views_are_averaged(made: Path, network: nn.Module, normalise: Normaliser) -> None:
    """Two clips with three crops each: left, right and centre; top, bottom and centre in a portrait clip."""
    found, _ = run(made, network, normalise, EvalProtocol(4, SIZE, "twice", 3), batch=4)
    for row in (0, 1):
        places = [(0, 2), (20, 2), (10, 2)] if row == 0 else [(2, 0), (2, 20), (2, 10)]
        views = [(frames, left, top, False) for frames in (MIDDLE, FIRST) for left, top in places]
        torch.testing.assert_close(found.logit_NK[row], by_hand(made, network, row, views))


def test_mirrored_crops_are_averaged(made: Path, network: nn.Module, normalise: Normaliser) -> None:
    found, _ = run(made, network, normalise, EvalProtocol(4, SIZE, "uniform", 10), batch=16)
    places = [(0, 0), (20, 0), (0, 4), (20, 4), (10, 2)]
    views = [(MIDDLE, left, top, mirrored) for left, top in places for mirrored in (False, True)]
    torch.testing.assert_close(found.logit_NK[2], by_hand(made, network, 2, views))


def test_a_mirrored_crop_counts_for_the_mirrored_class(
    made: Path, network: nn.Module, normalise: Normaliser, tmp_path: Path
) -> None:
    """With classes "left" and "right", exchange their logits in the views that are mirrored, and in no other."""
    manifest = ClipSource(made / "val.arrow", "pyav").manifest
    rows = [manifest.row(row) for row in range(CLIPS)]
    for row in rows:
        (tmp_path / row.path).symlink_to(made / row.path)
    write_manifest(tmp_path / "val.arrow", rows, ["go left", "stop", "go right"])
    found, _ = run(tmp_path, network, normalise, EvalProtocol(4, SIZE, "uniform", 10), batch=16)
    places = [(0, 0), (20, 0), (0, 4), (20, 4), (10, 2)]
    plain, mirrored = (
        by_hand(made, network, 2, [(MIDDLE, left, top, flip) for left, top in places]) for flip in (False, True)
    )
    torch.testing.assert_close(found.logit_NK[2], (plain + mirrored[[2, 1, 0]]) / 2)
    plain_found, _ = run(tmp_path, network, normalise, EvalProtocol(4, SIZE, "uniform", 5), batch=16)
    torch.testing.assert_close(plain_found.logit_NK[2], plain)


def test_how_mirrored_views_were_counted_is_said() -> None:
    assert describe_mirrored_views(None, ["left", "right"]) == ""
    assert describe_mirrored_views(find_mirror(["wave", "stop"]), ["wave", "stop"]) == ""
    classes = ["go left", "go right", "turn left"]
    assert describe_mirrored_views(find_mirror(classes), classes) == (
        "a mirrored view counts for the mirrored class (pairs: 1, such as 'go left' and 'go right'); "
        "mirrored views may look like no class (classes: 1, such as 'turn left')"
    )


@pytest.mark.parametrize("batch", [1, 4, 6, 16])
def test_the_network_takes_no_more_views_than_a_batch(
    batch: int, made: Path, network: nn.Module, normalise: Normaliser
) -> None:
    noting = Noting(network)
    found, _ = run(made, noting, normalise, EvalProtocol(4, SIZE, "twice", 3), batch)
    whole, _ = run(made, network, normalise, EvalProtocol(4, SIZE, "twice", 3), batch=30)
    assert max(noting.taken) <= batch
    assert sum(noting.taken) >= 6 * CLIPS
    torch.testing.assert_close(found.logit_NK, whole.logit_NK)


@pytest.mark.parametrize(("size", "batch"), [(2, 2), (3, 4), (4, 1), (7, 1)])
def test_ranks_add_up_to_one_process_and_padding_is_never_counted(
    size: int, batch: int, made: Path, network: nn.Module, normalise: Normaliser
) -> None:
    """World sizes that do not divide five clips: some ranks have padding, and two of seven have only padding."""
    alone, _ = run(made, network, normalise, CENTRE, batch=2)
    parts = [run(made, network, normalise, CENTRE, batch, rank, size)[0] for rank in range(size)]
    assert torch.stack([part.seen_N for part in parts]).int().sum(0).tolist() == [1] * CLIPS
    assert all(not part.logit_NK[~part.seen_N].any() for part in parts)
    torch.testing.assert_close(torch.stack([part.logit_NK for part in parts]).sum(0), alone.logit_NK)


def test_a_broken_clip_is_missing_and_changes_no_other(
    made: Path, network: nn.Module, normalise: Normaliser, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "clips"))
    os.truncate(folder / "3.mp4", 100)
    whole, _ = run(made, network, normalise, CENTRE, batch=2)
    found, missing = run(folder, network, normalise, CENTRE, batch=2)
    assert missing == [3]
    assert found.seen_N.tolist() == [True, True, True, False, True]
    torch.testing.assert_close(found.logit_NK[found.seen_N], whole.logit_NK[found.seen_N])
    scores = scores_of(found, None)
    assert (scores.clips, scores.missing) == (4, 1)


def test_the_network_goes_on_as_it_was(made: Path, network: nn.Module, normalise: Normaliser) -> None:
    for training in (True, False):
        network.train(training)
        run(made, network, normalise, CENTRE, batch=5)
        assert network.training == training


# --- Autocast ---------------------------------------------------------------------------------------------------------


class NotingTypes(Noting):
    """Wrapper that records the dtype of each layer's output."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.types: dict[str, torch.dtype] = {}
        for name, module in network.named_modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
                module.register_forward_hook(lambda _, args, out, name=name: self.types.update({name: out.dtype}))


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_evaluation_under_autocast(amp: str, made: Path, network: nn.Module) -> None:
    """Layers compute in the lower precision; logits and their means over views are float32."""
    noting, single = NotingTypes(copy.deepcopy(network).float()), Normaliser(CPU, NumericsConfig())
    protocol = EvalProtocol(4, SIZE, "twice", 3)
    whole, _ = run(made, noting, single, protocol, batch=4)
    assert set(noting.types.values()) == {torch.float32}
    found, _ = run(made, noting, single, protocol, batch=4, amp=amp)
    assert noting.types["features.0"] == getattr(torch, amp)
    assert found.logit_NK.dtype == torch.float32
    assert not found.logit_NK.equal(whole.logit_NK)
    torch.testing.assert_close(found.logit_NK, whole.logit_NK, rtol=0.02, atol=0.02)
    assert not torch.is_autocast_enabled("cpu")


def test_logits_of_our_networks_are_not_rounded_under_autocast() -> None:
    """The classifier computes in float32: bfloat16 logits have a relative spacing of 1/256 or more, and would tie."""
    torch.manual_seed(0)
    temporal = build_network("resnet18", 50, num_frames=4).eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        logit_NK = temporal(torch.randn(2, 4, 3, 32, 32))
    assert logit_NK.dtype == torch.float32
    assert not logit_NK.equal(logit_NK.bfloat16().float())


@pytest.mark.parametrize("amp", ["off", "bfloat16"])
def test_precise_batch_norm_runs_in_the_precision_of_the_evaluation(amp: str) -> None:
    torch.manual_seed(0)
    backend = OneOf(0, 1)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    convert_batch_norm(network, backend, 1, [], 1)
    types: list[torch.dtype] = []
    network[1].register_forward_pre_hook(lambda _, args: types.append(args[0].dtype))
    batches = [SimpleNamespace(video_NTCHW=torch.randn(8, 3, 9, 9) + 1) for _ in range(2)]
    config = Config()
    config.evaluation.amp, config.batch.precise_bn_steps = amp, len(batches)
    job: Any = SimpleNamespace(
        config=config,
        backend=backend,
        execution=SimpleNamespace(stream_positions=lambda *_: None),
        control=SimpleNamespace(progress=lambda *_: None),
        trainer=SimpleNamespace(network=network, normalise=lambda x: x, stream=None),
        training_clips=None,
        loader=lambda _: SimpleNamespace(batches=lambda _: batches),
    )
    _recompute_statistics(job, 0, lambda: False)
    assert types == [torch.float32 if amp == "off" else torch.bfloat16] * len(batches)
    seen_NCHW = network[0](torch.cat([batch.video_NTCHW for batch in batches])).detach()
    mean_C = network[1].running_mean
    assert isinstance(mean_C, Tensor) and mean_C.dtype == torch.float32
    torch.testing.assert_close(mean_C, seen_NCHW.mean((0, 2, 3)), rtol=0.01, atol=0.01)
    assert not torch.is_autocast_enabled("cpu")
