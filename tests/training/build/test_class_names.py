"""Match classes by name: of a run and its data, of two splits, and of checkpoints that hold no names."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipelines.manifest import Manifest, ManifestRow, write_manifest
from pipelines.stream.augmentation import Augmentation
from training.build.class_names import (
    REORDERED,
    UNNAMED,
    checkpoint_classes,
    digest_of,
    first_difference,
    lines_of,
    matched,
    positions_by_name,
)
from training.build.data import check_manifests, describe_mirror
from training.errors import ConfigError
from training.evaluation.metrics import ClipLogits, scores_of
from training.runs.run_folder import RunFolder

NAMES = ["wave", "stop", "swipe left", "swipe right", "clap", "jump", "sit"]


def manifest_of(path: Path, classes: list[str], label: int = 0) -> Manifest:
    path.parent.mkdir(parents=True, exist_ok=True)
    row = ManifestRow("a.mp4", 0, 10, label, 8, "h264", 64, 48, 0)
    write_manifest(path, [row], classes)
    return Manifest.open(path)


# --- Pure functions ---------------------------------------------------------------------------------------------------

orders = st.lists(st.sampled_from(NAMES), min_size=2, unique=True).flatmap(
    lambda names: st.tuples(st.just(names), st.permutations(names))
)


@settings(max_examples=50)
@given(orders, st.integers(0, 2**32))
def test_scores_do_not_depend_on_the_numbers_of_classes(order: tuple[list[str], list[str]], seed: int) -> None:
    """Evaluate a classifier on its own numbering of the classes and on any other one."""
    theirs, ours = order
    generator = torch.Generator().manual_seed(seed)
    feature_NF = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    classifier = nn.Linear(4, len(theirs), dtype=torch.float64)
    label_N = torch.randint(len(theirs), (9,), generator=generator)

    def logits(tensors: dict[str, Tensor]) -> Tensor:
        return feature_NF @ tensors["classifier.weight"].detach().T + tensors["classifier.bias"].detach()

    tensors = {f"classifier.{name}": tensor for name, tensor in classifier.state_dict().items()}
    manifest: Any = type("FakeManifest", (), {"classes": ours, "path": Path("val.arrow")})
    mapped, note = matched(tensors, theirs, "the run", manifest)
    assert note == ("" if ours == theirs else REORDERED)
    our_label_N = torch.tensor([ours.index(theirs[label]) for label in label_N.tolist()])
    seen_N = torch.ones(9, dtype=torch.bool)
    expected = scores_of(ClipLogits(logits(tensors), label_N, seen_N), None)
    found = scores_of(ClipLogits(logits(mapped), our_label_N, seen_N), None)
    assert found.as_dict() == pytest.approx(expected.as_dict())


@given(orders)
def test_positions_lead_from_one_order_to_the_other(order: tuple[list[str], list[str]]) -> None:
    theirs, ours = order
    positions = positions_by_name(theirs, ours)
    assert positions is not None and [theirs[position] for position in positions] == ours
    if theirs != ours:
        assert first_difference(ours, "here", theirs, "there") == (
            f"class {(at := next(k for k in range(len(ours)) if ours[k] != theirs[k]))} is {ours[at]!r} in here, "
            f"{theirs[at]!r} in there"
        )


@pytest.mark.parametrize(
    ("ours", "says"),
    [
        (["wave", "stop"], "class 2 is 'clap' in the run x, and .*val.arrow has only 2 classes"),
        (["wave", "stop", "clap", "sit"], "class 3 is 'sit' in .*val.arrow, and the run x has only 3 classes"),
        (["wave", "halt", "clap"], "class 1 is 'halt' in .*val.arrow, 'stop' in the run x"),
    ],
    ids=["fewer", "more", "others"],
)
def test_other_classes_are_refused_and_named(tmp_path: Path, ours: list[str], says: str) -> None:
    data = manifest_of(tmp_path / "val.arrow", ours)
    with pytest.raises(ConfigError, match=rf"the run x has other classes than the data: {says}\. Fix: evaluate on"):
        matched({}, ["wave", "stop", "clap"], "the run x", data)


def test_weights_without_names_are_taken_as_they_are_and_said(tmp_path: Path) -> None:
    tensors = {"classifier.bias": torch.arange(2.0)}
    assert matched(tensors, None, "the run x", manifest_of(tmp_path / "val.arrow", NAMES)) == (tensors, UNNAMED)


# --- Run folder and checkpoints ---------------------------------------------------------------------------------------


def test_the_run_folder_names_the_classes(tmp_path: Path) -> None:
    """Include a name that is no valid Unicode, as a folder's may be."""
    names = [*NAMES, "caf\udce9"]
    RunFolder(tmp_path).write_classes(names)
    content = (tmp_path / "classes.txt").read_bytes()
    assert content.decode().splitlines() == [*NAMES, "caf\\udce9"]
    assert content == lines_of(names)
    assert digest_of(names) == hashlib.sha256(content).hexdigest() != digest_of(NAMES)


def test_a_checkpoint_names_its_classes(tmp_path: Path) -> None:
    state = {"classes": NAMES, "recipe": {"manifest_digest": manifest_of(tmp_path / "train.arrow", ["a", "b"]).digest}}
    assert checkpoint_classes(state, tmp_path, tmp_path / "train.arrow") == NAMES


def test_an_older_checkpoint_is_named_by_its_training_manifest(tmp_path: Path) -> None:
    """The manifest counts only if its digest is the recipe's: a manifest made again may have other classes."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(f"data:\n  root: {tmp_path / 'data'}\n  train: train.arrow\n")
    state = {"recipe": {"manifest_digest": manifest_of(tmp_path / "data" / "train.arrow", NAMES).digest}}
    assert checkpoint_classes(state, run) == NAMES
    (tmp_path / "data").rename(tmp_path / "moved")
    assert checkpoint_classes(state, run) is None
    assert checkpoint_classes(state, run, tmp_path / "moved" / "train.arrow") == NAMES
    manifest_of(tmp_path / "moved" / "train.arrow", NAMES[::-1])
    assert checkpoint_classes(state, run, tmp_path / "moved" / "train.arrow") is None


@pytest.mark.parametrize("config", ["", "data: 3", "data:\n  root: /nowhere\n", "data: [", "- 1"])
def test_a_run_folder_that_says_nothing_is_no_error(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.yaml").write_text(config)
    assert checkpoint_classes({"recipe": {"manifest_digest": "digest"}}, tmp_path) is None
    assert checkpoint_classes({}, tmp_path / "nowhere") is None


# --- The manifests of one data set ------------------------------------------------------------------------------------


def augmentation(flip: str, *words: tuple[str, str]) -> Augmentation:
    return Augmentation(num_frames=8, size=32, flip=flip, mirrored_words=words)


def test_splits_of_different_classes_are_refused(tmp_path: Path) -> None:
    training = manifest_of(tmp_path / "train.arrow", ["aa", "bb"])
    check_manifests(training, manifest_of(tmp_path / "same.arrow", ["aa", "bb"]), augmentation("off"))
    other = manifest_of(tmp_path / "val.arrow", ["bb", "aa"])
    with pytest.raises(
        ConfigError, match=r"class 0 is 'bb' in .*/val\.arrow, 'aa' in .*/train\.arrow\. Fix: prepare both"
    ):
        check_manifests(training, other, augmentation("off"))


def test_a_flip_is_checked_against_the_names_of_the_classes(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path / "train.arrow", NAMES)
    with pytest.raises(
        ConfigError, match=r"pipeline\.flip=on: class 'swipe left' mirrored is class 'swipe right'.*Fix: "
    ):
        check_manifests(manifest, manifest, augmentation("on"))
    check_manifests(manifest, manifest, augmentation("off"))
    check_manifests(manifest, manifest, augmentation("relabel", ("left", "right")))
    assert describe_mirror(manifest, augmentation("relabel", ("left", "right"))) == []


def test_a_direction_without_a_partner_is_warned_of(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path / "train.arrow", ["turn left", "look right", "stop"])
    check_manifests(manifest, manifest, augmentation("on"))
    (line,) = describe_mirror(manifest, augmentation("on"))
    assert line.startswith("warning    pipeline.flip=on mirrors clips of 'turn left' (and 1 more)")
    assert line.endswith("pipeline.flip=off")
    assert describe_mirror(manifest, augmentation("off")) == []
