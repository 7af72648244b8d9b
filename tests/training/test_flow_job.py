"""A job on optical flow: it trains and evaluates, and clips of the other modality are refused before any work."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from distributed.backends.single import SingleBackend
from distributed.topology import Topology
from pipelines.stream.modality import FRAMES_PER_SEGMENT, channels_of
from tests.helpers.clips import smooth_video, write_clips
from tests.pipelines.loading.test_flow_clips import write_clips as write_flow_clips
from tests.training.config.test_config import config_of
from training.build.data import make_loader, open_manifest
from training.errors import DataError
from training.evaluation.evaluate import evaluate
from training.job import Job, build_job
from tsm.modality import INPUT_CHANNELS

pytestmark = pytest.mark.usefixtures("one_thread")


def job_of(root: Path, *overrides: str) -> Job:
    settings = (
        "data.val=train.arrow data.num_classes=2 pipeline.size=32 pipeline.workers=0 model.num_frames=4 "
        "batch.global_batch=4 batch.bn_group=4 schedule.epochs=2 distributed=single run_id=new"
    )
    config = config_of(
        "experiment=smoke", f"data.root={root}", f"outputs={root / 'outputs'}", *settings.split(), *overrides
    )
    control: Any = SimpleNamespace()
    return build_job(config, SingleBackend(Topology("none", 0, 1, 0, 1, 0, "here"), torch.device("cpu")), control)


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flow")
    write_flow_clips(folder)
    return folder


def test_both_packages_mean_the_same_input() -> None:
    """tsm and pipelines do not import each other."""
    assert {modality: channels_of(modality) for modality in FRAMES_PER_SEGMENT} == INPUT_CHANNELS


def test_a_flow_job_trains_and_is_evaluated(flow: Path) -> None:
    job = job_of(flow, "model.modality=flow", "data.mirrored_words=[]", "pipeline.flip=on")
    (batch,) = make_loader(job.config.pipeline, job.training_clips, job.backend).batches([np.arange(4)])
    assert (batch.video_NTCHW.shape, batch.video_NTCHW.dtype) == ((4, 4, 10, 32, 32), torch.uint8)
    network = job.trainer.network
    before = network.get_parameter("backbone.conv1.weight").detach().clone()
    loss, _, clips, skipped = job.trainer.step(0, [batch]).tolist()
    assert 0 < loss / clips < 10 and (clips, skipped) == (4, 0)
    changed = (network.get_parameter("backbone.conv1.weight") != before).flatten(2).any(2)
    assert changed.all(0).tolist() == [True] * 10

    loader = make_loader(job.config.pipeline, job.validation_clips, job.backend)
    settings = job.config.evaluation
    evaluation = evaluate(network, job.trainer.normalise, job.validation_clips, loader, job.backend, settings)
    manifest = open_manifest(job.config.data, "val")
    assert job.validation_clips.protocol.name == "4x32-flow-uniform_validation-1crop"
    assert (len(evaluation.clip_logits.logit_NK), evaluation.missing) == (len(manifest), [])


def test_clips_of_the_other_modality_are_refused(flow: Path, tmp_path: Path) -> None:
    write_clips(tmp_path / "train.arrow", [smooth_video(seed=seed) for seed in range(4)])
    with pytest.raises(
        DataError,
        match=r"train\.arrow has clips of flow, and model\.modality=rgb\. Fix: .*videos or frames, or model\.modality=flow",
    ):
        job_of(flow)
    with pytest.raises(
        DataError,
        match=r"train\.arrow has clips of rgb, and model\.modality=flow\. Fix: .*prepare\.py flow.*, or model\.modality=rgb",
    ):
        job_of(tmp_path, "model.modality=flow", "data.num_classes=3")
