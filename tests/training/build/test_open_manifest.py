"""Refuse a manifest whose content changed after prepare.py wrote it, and one without labels where labels are needed."""

from pathlib import Path

import numpy as np
import pytest

from pipelines.manifest import UNLABELLED, Manifest, ManifestRow, write_manifest
from runtime.exit_codes import EXIT_DATA
from training.build.class_names import checkpoint_classes
from training.build.data import check_modality, open_manifest
from training.config.schema import DataConfig
from training.errors import DataError


def change_labels(path: Path) -> None:
    """Move all labels by one row, and keep the rest of the file."""
    content = path.read_bytes()
    labels = Manifest.open(path).labels()
    assert content.count(labels.tobytes()) == 1
    path.write_bytes(content.replace(labels.tobytes(), np.roll(labels, 1).tobytes()))


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    rows = [ManifestRow(f"{number}.mp4", 0, 10, number % 3, 8, "h264", 64, 48, 0) for number in range(9)]
    write_manifest(tmp_path / "train.arrow", rows, ["a", "b", "c"], split="train")
    return DataConfig(root=str(tmp_path), train="train.arrow", num_classes=3, prepare="python prepare.py folder")


def test_a_changed_manifest_is_refused(data: DataConfig) -> None:
    open_manifest(data, "train")
    change_labels(Path(data.root) / "train.arrow")
    with pytest.raises(
        DataError, match=r"train\.arrow: its content does not match its digest.*Fix: python prepare"
    ) as caught:
        open_manifest(data, "train")
    assert caught.value.exit_code == EXIT_DATA


def test_a_manifest_of_both_modalities_is_refused(data: DataConfig) -> None:
    rows = [ManifestRow("a.tar", 512, 10, 0, 8, codec, 64, 48, 0) for codec in ("jpeg-flow-rg", "vp9")]
    write_manifest(Path(data.root) / "train.arrow", rows, ["a", "b", "c"], split="train")
    message = "has clips of rgb, and model.modality=flow. Fix: prepare frames and optical flow into a folder each"
    with pytest.raises(DataError, match=message) as caught:
        check_modality(open_manifest(data, "train"), "flow")
    assert caught.value.exit_code == EXIT_DATA


def test_a_changed_manifest_names_no_classes_of_an_old_checkpoint(data: DataConfig, tmp_path: Path) -> None:
    path = Path(data.root) / "train.arrow"
    state = {"recipe": {"manifest_digest": Manifest.open(path).digest}}
    assert checkpoint_classes(state, tmp_path, path) == ["a", "b", "c"]
    path.write_bytes(path.read_bytes().replace(b'["a", "b", "c"]', b'["b", "a", "c"]'))
    assert Manifest.open(path).classes == ["b", "a", "c"]
    assert checkpoint_classes(state, tmp_path, path) is None


def test_clips_without_labels_are_only_for_tests(data: DataConfig) -> None:
    """Neither training nor validation takes them, whatever the file's name; the remedy that the error names works."""
    root = Path(data.root)
    rows = [ManifestRow(f"{number}.mp4", 0, 10, UNLABELLED, 8, "h264", 64, 48, 0) for number in range(3)]
    write_manifest(root / "test.arrow", rows, ["a", "b", "c"], split="test")
    assert not open_manifest(data, "test").labelled
    assert open_manifest(data, "train").labelled
    for split in ("train", "val"):
        setattr(data, split, "test.arrow")
        with pytest.raises(
            DataError, match=rf"clips without labels.* Fix: data\.{split}=FILE.*evaluation\.split=test data\.test=FILE"
        ) as caught:
            open_manifest(data, split)
        assert caught.value.exit_code == EXIT_DATA
    data.test = "other.arrow"
    with pytest.raises(
        DataError, match=r"other\.arrow: no such manifest.*Fix: python prepare\.py folder; .*data\.test=FILE"
    ):
        open_manifest(data, "test")
