"""The folder that --run names: a run, one of its checkpoints, or an error with a run that exists."""

from pathlib import Path

import pytest

from training.config import named_run
from training.config.named_run import find_run
from training.errors import ConfigError


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with two runs in outputs, and a working directory elsewhere."""
    checkout, elsewhere = tmp_path / "checkout", tmp_path / "elsewhere"
    for name in ("mine", "other"):
        (checkout / "outputs" / name / "checkpoints" / "step-00000005").mkdir(parents=True)
        (checkout / "outputs" / name / "config.yaml").touch()
    elsewhere.mkdir()
    monkeypatch.setattr(named_run, "CHECKOUT", checkout)
    monkeypatch.chdir(elsewhere)
    return checkout / "outputs"


@pytest.mark.parametrize(
    "named",
    [
        "outputs/mine",
        "outputs/mine/",
        "outputs/../outputs/mine",
        "outputs/mine/checkpoints",
        "outputs/mine/config.yaml",
    ],
)
def test_a_relative_path_starts_in_the_checkout(outputs: Path, named: str) -> None:
    assert find_run(named) == (outputs / "mine", None)


def test_a_relative_path_starts_in_the_working_directory_if_it_is_there(
    outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = outputs.parents[1] / "elsewhere" / "outputs" / "mine"
    ours.mkdir(parents=True)
    (ours / "config.yaml").touch()
    assert find_run("outputs/mine") == (ours, None)
    monkeypatch.chdir(outputs / "mine")
    assert find_run(".") == (outputs / "mine", None)
    assert find_run("../other") == (outputs / "other", None)


@pytest.mark.parametrize("checkpoint", ["step-00000005", "best"])
def test_a_checkpoint_of_a_run_is_that_runs(outputs: Path, checkpoint: str) -> None:
    (outputs / "mine" / "checkpoints" / "best").symlink_to("step-00000005")
    assert find_run(f"outputs/mine/checkpoints/{checkpoint}/") == (outputs / "mine", checkpoint)


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ("outputs/mien", r"--run outputs/mien: there is no folder .*elsewhere/outputs/mien or .*checkout/outputs/mien\. "
         "Fix: --run outputs/mine$"),
        ("mine", r"there is no folder .* Fix: --run outputs/mine$"),
        ("outputs", r"outputs is no run folder, it has no config\.yaml\. Fix: --run outputs/(mine|other)$"),
        ("", r"elsewhere is no run folder.* Fix: --run outputs/"),
        ("outputs/other/checkpoints/step-00000006", r"there is no folder .* Fix: --run outputs/other$"),
        ("n" * 300, r"File name too long\. Fix: --run outputs/NAME"),
        ("outputs/other/config.yam", r"there is no folder .* Fix: --run outputs/other$"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_run_is_refused_with_one_that_is(outputs: Path, named: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        find_run(named)


def test_a_run_without_a_flag_is_refused_without_a_flag(outputs: Path) -> None:
    """As `predict.py RUN` takes it."""
    with pytest.raises(ConfigError, match=r"^mien: there is no folder .* Fix: outputs/mine$"):
        find_run("mien", flag="")
    (outputs / "mine" / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"without its run\. Fix: copy the run's config\.yaml to .*outputs/mine$"):
        find_run("outputs/mine/checkpoints/step-00000005", flag="")


def test_links_are_not_resolved(outputs: Path) -> None:
    (outputs / "latest").symlink_to("mine")
    (outputs.parent / "scratch").symlink_to("outputs")
    assert find_run("scratch/latest") == (outputs.parent / "scratch" / "latest", None)


def test_a_checkpoint_without_its_run_is_refused(outputs: Path) -> None:
    (outputs / "mine" / "config.yaml").unlink()
    with pytest.raises(
        ConfigError, match=r"without its run\. Fix: experiment=NAME model\.init=outputs/mine/checkpoints/step"
    ):
        find_run("outputs/mine/checkpoints/step-00000005")


def test_no_run_at_all(outputs: Path) -> None:
    for config in outputs.glob("*/config.yaml"):
        config.unlink()
    with pytest.raises(ConfigError, match="Fix: --run outputs/NAME of a run that was started"):
        find_run("outputs/mine")
