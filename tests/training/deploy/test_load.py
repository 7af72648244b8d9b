"""A trained run is loaded for use: its weights, names and settings, wherever its data are."""

from pathlib import Path

import pytest
import torch

from distributed.checkpoint.store import Checkpoint, Snapshot, load_checkpoint, write_snapshot
from tests.helpers.tiny_run import write_run
from training.deploy.load import load_trained
from training.errors import ConfigError
from training.optim.ema import PREFIX

CLASSES = ["move left", "move right", "stay"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an EMA, trained with DALI on GPUs that are not here, whose data are gone."""
    folder = tmp_path_factory.mktemp("outputs") / "mine"
    write_run(
        folder, CLASSES, "optimizer.ema_decay=0.9", "pipeline.loader=dali", "distributed.device=cuda", "data.root=/gone"
    )
    return folder


def test_all_comes_from_the_run_but_the_machine(run: Path) -> None:
    trained = load_trained(str(run), ["distributed.device=cpu"])
    checkpoint = load_checkpoint(run / "checkpoints" / "step-00000005")
    weight = "backbone.conv1.weight"
    assert torch.equal(trained.network.state_dict()[weight], checkpoint.optimizer[PREFIX + weight])
    assert not torch.equal(trained.network.state_dict()[weight], checkpoint.network[weight])
    assert (trained.name, trained.step, trained.classes) == ("mine", 5, CLASSES)
    assert trained.protocol.name == "4x32-uniform_validation-1crop"
    assert not trained.network.training
    assert trained.recipe["model"]["num_frames"] == 4
    assert trained.config.pipeline.decoder == "auto"
    assert trained.notes == ["differs from the run: pipeline.loader=torch (trained: dali)"]


def test_overrides_and_a_checkpoint_are_taken_as_evaluate_takes_them(run: Path) -> None:
    trained = load_trained(str(run / "checkpoints" / "best"), ["evaluation=ten_crop", "distributed.device=cpu"])
    assert trained.config.evaluation.checkpoint == "best"
    assert trained.protocol.views > 1 and "evaluation.crops=10 (trained: 1)" in trained.notes[0]
    with pytest.raises(ConfigError, match=r"model\.shift=residual, not none\. Fix: model\.shift=residual"):
        load_trained(str(run), ["model.shift=none"])
    with pytest.raises(ConfigError, match=r"only training reads seed"):
        load_trained(str(run), ["seed=4"])
    with pytest.raises(ConfigError, match=r"not a whole checkpoint.*Fix: evaluation\.checkpoint=newest"):
        load_trained(str(run), ["evaluation.checkpoint=step-00000004"])


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "empty", CLASSES)
    (tmp_path / "empty" / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"holds no whole checkpoint\. Fix: name the folder of a run that has one"):
        load_trained(str(tmp_path / "empty"))


def test_classes_of_an_old_checkpoint_are_numbers_where_nothing_has_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    write_run(folder, CLASSES, "data.root=/gone")
    checkpoint = load_checkpoint(folder / "checkpoints" / "best")
    state = {key: value for key, value in checkpoint.state.items() if not key.startswith("classes")}
    older = Checkpoint(checkpoint.network, checkpoint.optimizer, state)
    write_snapshot(folder / "checkpoints", Snapshot().take(older), keep=1)
    trained = load_trained(str(folder))
    assert trained.classes == ["0", "1", "2"]
    assert "old has no class names" in trained.notes[0]
