"""Recognize one file under several names: links that lead back, folders reached twice, and clips that two splits share."""

import csv
import os
from pathlib import Path

import pytest

import prepare
from pipelines.manifest import Manifest
from pipelines.prepare.annotations.base import Annotations, Clip, check_annotations
from pipelines.prepare.annotations.class_folders import read_class_folders
from pipelines.prepare.annotations.locate import videos_by_stem
from pipelines.prepare.annotations.same_files import SAME_FILES_NAME, check_same_files
from pipelines.prepare.errors import DataSetError
from tests.helpers.clips import write_mp4


def touch(*paths: Path) -> None:
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"." * (number + 1))


def link(name: Path, target: Path) -> None:
    name.parent.mkdir(parents=True, exist_ok=True)
    name.symlink_to(target)


def found_below(videos: Path) -> list[str]:
    return sorted(str(path.relative_to(videos)) for paths in videos_by_stem(videos).values() for path in paths)


# --- Walking folders --------------------------------------------------------------------------------------------------


def test_links_that_lead_back(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    touch(videos / "train" / "a.mp4", videos / "val" / "b.mp4")
    link(videos / "videos", videos)
    link(videos / "train" / "again", Path())
    link(videos / "val" / "up", tmp_path)
    link(videos / "val" / "itself", Path("itself"))
    assert found_below(videos) == ["train/a.mp4", "val/b.mp4"]
    # A link is followed where it starts.
    link(tmp_path / "linked", videos)
    assert found_below(tmp_path / "linked") == ["train/a.mp4", "val/b.mp4"]


def test_a_folder_that_is_reached_twice(tmp_path: Path) -> None:
    """Walk it once, by its own name where it has one below the videos; a name that sorts first changes nothing."""
    videos, store = tmp_path / "videos", tmp_path / "store"
    touch(videos / "train" / "a.mp4", store / "more" / "c.mp4")
    link(videos / "all", videos / "train")
    link(videos / "one", store)
    link(videos / "two", store / "more")
    assert found_below(videos) == ["one/more/c.mp4", "train/a.mp4"]


def test_names_of_one_video(tmp_path: Path) -> None:
    touch(tmp_path / "b" / "x.mp4", tmp_path / "b" / "y.mp4")
    link(tmp_path / "a" / "x.mp4", tmp_path / "b" / "x.mp4")
    link(tmp_path / "a" / "y.mp4", tmp_path / "gone.mp4")
    link(tmp_path / "a" / "z.mp4", tmp_path / "gone.mp4")
    os.link(tmp_path / "b" / "x.mp4", tmp_path / "x.mkv")
    touch(tmp_path / "c" / "x.mp4")
    assert found_below(tmp_path) == ["a/z.mp4", "b/y.mp4", "c/x.mp4", "x.mkv"]


def test_kinetics_behind_links(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header, videos = "label,youtube_id,time_start,time_end,split\n", tmp_path / "videos"
    for split in ("train", "val"):
        path = videos / split / f"{split}_000001_000011.mp4"
        path.parent.mkdir(parents=True)
        write_mp4(path)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"{split}.csv").write_text(f"{header}yoga,{split},1,11,{split}\n")
    for level in ("", "train", "val"):
        link(videos / level / "videos", videos)
    assert prepare.main(["kinetics", "--root", str(tmp_path), "--workers", "0"]) == 0
    assert Manifest.open(tmp_path / "val.arrow").row(0).path == "videos/val/val_000001_000011.mp4"
    # Copies are more than one video. The message does not grow with their number.
    for number in range(40):
        touch(videos / "train" / f"{number:02d}" / "train_000001_000011.mp4")
    (videos / "train" / "train_000001_000011.mp4").unlink()
    assert prepare.main(["kinetics", "--root", str(tmp_path), "--workers", "0"]) == 2
    assert "train/02/train_000001_000011.mp4 and 37 more. Fix: keep one of them" in capsys.readouterr().err


@pytest.mark.parametrize("val_fraction", [None, 0.5])
def test_class_folders_behind_links(tmp_path: Path, val_fraction: float | None) -> None:
    folders = [tmp_path] if val_fraction else [tmp_path / "train", tmp_path / "val"]
    for folder in folders:
        touch(*(folder / name / f"{folder.name}{number}.mp4" for name in "ab" for number in range(9)))
    before = read_class_folders(tmp_path, val_fraction)
    assert before.notes == ()
    for folder in folders:
        link(folder / folder.name, folder)
        link(folder / "a" / "a", folder / "a")
        link(folder / "b" / "up", folder)
    after = read_class_folders(tmp_path, val_fraction)
    assert (after.classes, after.splits) == (before.classes, before.splits)
    (note,) = after.notes
    assert note.startswith(f"{3 * len(folders)} links skipped: they lead back")


# --- Clips that are listed twice --------------------------------------------------------------------------------------


def listed(root: Path, **splits: list[str]) -> Annotations:
    """Annotations with these paths, labelled by their place in their list."""
    return Annotations(
        [str(number) for number in range(9)],
        {
            split: [Clip(root / name, label, f"{split}.txt, line {label + 1}") for label, name in enumerate(names)]
            for split, names in splits.items()
        },
    )


SPELLINGS = ["a/x.mp4", "a/../a/x.mp4", "a//./x.mp4", "folder/x.mp4", "folder/../a/x.mp4"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_any_spelling_of_a_path_is_listed_once(tmp_path: Path, spelling: str) -> None:
    touch(tmp_path / "a" / "x.mp4", tmp_path / "y.mp4")
    link(tmp_path / "folder", tmp_path / "a")
    wrong: list[dict[str, list[str]]] = [
        {"train": ["a/x.mp4", spelling], "val": ["y.mp4"]},
        {"train": ["a/x.mp4"], "val": ["y.mp4", spelling]},
        {"train": ["a/x.mp4"], "val": ["y.mp4"], "test": [spelling]},
        {"train": ["y.mp4"], "val": ["a/x.mp4", spelling]},
    ]
    for splits in wrong:
        with pytest.raises(DataSetError, match="was listed before, by .* line 1. Fix: remove one of the two"):
            check_annotations(listed(tmp_path, **splits))
    check_annotations(listed(tmp_path, train=["y.mp4"], val=["a/x.mp4"], test=[spelling]))


@pytest.mark.parametrize("how", ["symlink", "hard link"])
def test_training_and_evaluation_share_no_file(tmp_path: Path, how: str) -> None:
    train = [f"train/{number}.mp4" for number in range(5)]
    touch(*(tmp_path / name for name in train))
    val = [f"val/{number}.mp4" for number in range(5)]
    for old, new in zip(train, val, strict=True):
        if how == "symlink":
            link(tmp_path / new, tmp_path / old)
        else:
            (tmp_path / new).parent.mkdir(exist_ok=True)
            os.link(tmp_path / old, tmp_path / new)
    check_annotations(listed(tmp_path, train=train, val=val))
    for splits in ({"train": train, "val": val}, {"train": train, "val": ["missing"], "test": val}):
        with pytest.raises(DataSetError) as caught:
            check_same_files(tmp_path, listed(tmp_path, **splits))
        said = str(caught.value)
        assert f"training and evaluation share the file of 5 clips: {tmp_path}/val/0.mp4 (" in said
        assert f"{tmp_path}/val/2.mp4" in said and "val/3.mp4" not in said and " and 2 more. All: " in said
        with open(tmp_path / SAME_FILES_NAME, newline="") as file:
            table = list(csv.reader(file))
        assert table[5][1:] == [f"{tmp_path}/val/4.mp4", table[5][2], f"{tmp_path}/train/4.mp4", "train.txt, line 5"]
    assert check_same_files(tmp_path, listed(tmp_path, train=["missing"], val=train, test=val)) == []


def test_a_split_that_lists_a_file_twice_has_a_note(tmp_path: Path) -> None:
    touch(tmp_path / "a.mp4", tmp_path / "v.mp4")
    link(tmp_path / "b.mp4", tmp_path / "a.mp4")
    (note,) = check_same_files(tmp_path, listed(tmp_path, train=["a.mp4", "b.mp4"], val=["v.mp4"]))
    assert note == (
        f"NOTE: 1 train clips repeat the file of an earlier one, 1 with another label: {tmp_path}/b.mp4 = {tmp_path}/a.mp4"
    )
    assert not (tmp_path / SAME_FILES_NAME).exists()


def test_copies_are_found_on_request(tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    for name, content in {"a.mp4": b"one", "b.mp4": b"two", "c.mp4": b"one", "d.mp4": b"three", "e.mp4": b""}.items():
        (tmp_path / name).write_bytes(content)
    leak = listed(tmp_path, train=["a.mp4", "d.mp4", "e.mp4"], val=["b.mp4", "c.mp4", "frames", "missing"])
    assert check_same_files(tmp_path, leak) == []
    with pytest.raises(DataSetError, match=r"share the content of 1 clips: \S*/c.mp4 \(val\) = \S*/a"):
        check_same_files(tmp_path, leak, by_content=True)
    fine = listed(tmp_path, train=["a.mp4", "c.mp4", "e.mp4"], val=["b.mp4", "d.mp4", "frames"])
    (note,) = check_same_files(tmp_path, fine, by_content=True)
    assert note.startswith("NOTE: 1 train clips repeat the content of an earlier one, ")


def test_the_check_of_the_content_is_an_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        path = tmp_path / split / "a" / f"{split}.mp4"
        path.parent.mkdir(parents=True)
        write_mp4(path)
    arguments = ["folder", "--root", str(tmp_path), "--workers", "0"]
    assert prepare.main([*arguments, "--check-content"]) == 2
    assert f"{tmp_path}/val/a/val.mp4 (val) = {tmp_path}/train/a/train.mp4" in capsys.readouterr().err
    assert not (tmp_path / "train.arrow").exists()
    assert prepare.main(arguments) == 0
