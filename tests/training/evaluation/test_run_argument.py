"""`evaluate.py --run FOLDER`: the run's configuration, with the overrides applied."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.training.config.test_config import config_of
from training.config.load import from_composed
from training.config.schema import Config
from training.errors import ConfigError
from training.evaluation.run_argument import config_of_run
from training.runs.run_folder import RunFolder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 1,536 processes, with settings of its own."""
    folder = tmp_path_factory.mktemp("outputs") / "run"
    own = "model.num_frames=4 pipeline.size=64 evaluation.batch=7 evaluation.amp=bfloat16 evaluation.crops=5 pipeline.loader=dali"
    RunFolder(folder).write_config(
        config_of("experiment=smoke", "distributed=horovod", "distributed.world_size=1536", *own.split())
    )
    (folder / "checkpoints" / "step-00000005").mkdir(parents=True)
    return folder


def configured(run: Path, *overrides: str) -> Config:
    return from_composed(config_of_run(overrides, str(run)))


def test_everything_comes_from_the_run_but_the_processes(run: Path) -> None:
    config = configured(run, "data.root=/new")
    assert (config.model.num_frames, config.pipeline.size, config.evaluation.crops) == (4, 64, 5)
    assert (config.outputs, config.run_id, config.data.root) == (str(run.parent), "run", "/new")
    distributed = config.distributed
    assert (distributed.backend, distributed.controller, distributed.world_size) == ("auto", "auto", None)
    assert configured(run, "distributed=torch", "distributed.world_size=2").distributed.world_size == 2


def test_a_group_changes_only_the_keys_that_its_files_set(run: Path) -> None:
    evaluation = configured(run, "evaluation=two_clips_full").evaluation
    assert (evaluation.clips, evaluation.crops, evaluation.full_resolution) == ("twice", 3, True)
    assert (evaluation.batch, evaluation.amp) == (7, "bfloat16")
    evaluation = configured(run, "evaluation=validation").evaluation
    assert (evaluation.clips, evaluation.crops, evaluation.batch) == ("validation", 1, 7)
    pipeline = configured(run, "pipeline=torch").pipeline
    assert (pipeline.loader, pipeline.size) == ("torch", 64)


def test_a_checkpoint_of_the_run_is_the_one_to_evaluate(run: Path) -> None:
    assert configured(run).evaluation.checkpoint == "newest"
    assert configured(run / "checkpoints" / "step-00000005").evaluation.checkpoint == "step-00000005"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seed=3", r"seed=3 .*only training reads seed.*Fix: leave it out"),
        ("model.init=other.pth", r"only training reads model\.init"),
        ("numerics.amp=bfloat16", r"only training reads numerics\.amp.*evaluation\.amp=bfloat16"),
        ("run_id=other", r"run_id=other.*Fix: leave it out, or leave out --run"),
        ("experiment=smoke", r"experiment=smoke.*Fix: leave it out, or leave out --run"),
        ("model.shfit=none", r"model\.shift"),
    ],
)
def test_an_override_that_would_do_nothing_is_refused(run: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        configured(run, override)


def test_an_override_that_confirms_the_run_is_taken(run: Path) -> None:
    assert configured(run, "seed=0", "model.shift=residual").seed == 0


def test_keys_that_an_old_run_lacks_have_their_defaults(run: Path, tmp_path: Path) -> None:
    loaded: Any = OmegaConf.load(run / "config.yaml")
    for key in ("amp", "crops", "checkpoint"):
        del loaded.evaluation[key]
    del loaded["plan"]
    OmegaConf.save(loaded, tmp_path / "config.yaml")
    evaluation = configured(tmp_path).evaluation
    assert (evaluation.amp, evaluation.crops, evaluation.checkpoint, evaluation.batch) == ("off", 1, "newest", 7)
