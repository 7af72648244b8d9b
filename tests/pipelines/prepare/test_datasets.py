"""Read tiny data sets in their published forms: rows, labels, classes, splits and order; report wrong annotations."""

import csv
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare
from pipelines.jpeg_clips import JPEG_FRAMES
from pipelines.manifest import UNLABELLED, Manifest
from pipelines.prepare.annotations.lists import read_lists
from tests.helpers.clips import plain_video, write_frames, write_mp4, write_video

Rows = list[tuple[str, int]]


@pytest.fixture(scope="session")
def a_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mp4(tmp_path_factory.mktemp("clip") / "clip.mp4")


@pytest.fixture(scope="session")
def an_avi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("clip") / "clip.avi", plain_video(), "mpeg4")


@pytest.fixture(scope="session")
def a_webm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(
        tmp_path_factory.mktemp("clip") / "clip.webm", plain_video(), "libvpx-vp9", options={"cpu-used": "8"}
    )


def copies(clip: Path, paths: Iterable[Path]) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(clip, path)


def text(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def run(*arguments: object) -> int:
    return prepare.main([*map(str, arguments), "--workers", "0"])


def rows(root: Path, split: str) -> Rows:
    manifest = Manifest.open(root / f"{split}.arrow")
    assert manifest.split == split
    found = [manifest.row(index) for index in range(len(manifest))]
    # Every path of the manifest must exist.
    for row in found:
        name = manifest.root / row.path
        assert (name if row.codec != JPEG_FRAMES else name.with_name(name.name % row.offset)).is_file()
    return [(row.path, row.label) for row in found]


def classes(root: Path) -> list[str]:
    both = [Manifest.open(root / f"{split}.arrow").classes for split in ("train", "val")]
    assert both[0] == both[1]
    return both[0]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run prepare.py, check that it fails without writing a manifest, and return its one error line."""
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith("scan: ")]
    assert len(lines) == 1 and captured.out == ""
    root = Path(str(arguments[arguments.index("--root") + 1]))
    assert not list(root.glob("*.arrow"))
    return lines[0]


# --- Kinetics ---------------------------------------------------------------------------------------------------------

KINETICS_HEADER = "label,youtube_id,time_start,time_end,split,is_cc"


@pytest.fixture
def kinetics(tmp_path: Path, a_clip: Path) -> Path:
    """A data set of three classes whose videos lie under split and class, flat, or under short numbers; one is missing."""
    root = tmp_path / "k400"
    text(
        root / "annotations" / "train.csv",
        KINETICS_HEADER,
        "yoga,-3B32lodo2M,59,69,train,0",
        '"shooting goal (soccer)",_dbcJuKJQNs,40,50,train,0',
        "air drumming,0000000000A,0,10,train,0",
        "yoga,gone0000001,12,22,train,0",
        '"yoga",short_n-mbr,5,15,train,0',
    )
    text(
        root / "annotations" / "validate.csv",
        KINETICS_HEADER.removesuffix(",is_cc"),
        "air drumming,val00000001,100,110,validate",
        "yoga,val00000002,7.0,17.0,validate",
    )
    text(root / "annotations" / "test.csv", "youtube_id,time_start,time_end,split", "test0000001,1,11,test")
    videos = root / "videos"
    copies(
        a_clip,
        [
            videos / "train" / "yoga" / "-3B32lodo2M_000059_000069.mp4",
            videos / "train" / "shooting goal (soccer)" / "_dbcJuKJQNs_000040_000050.mkv",
            videos / "0000000000A_000000_000010.mp4",
            videos / "train" / "yoga" / "short_n-mbr_5_15.mp4",
            videos / "val" / "val00000001_000100_000110.mp4",
            videos / "val" / "val00000002_000007_000017.mp4",
            videos / "test" / "test0000001_000001_000011.mp4",
        ],
    )
    return root


def test_kinetics(kinetics: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("kinetics", "--root", kinetics) == 0
    assert classes(kinetics) == ["air drumming", "shooting goal (soccer)", "yoga"]
    assert rows(kinetics, "train") == [
        ("videos/train/yoga/-3B32lodo2M_000059_000069.mp4", 2),
        ("videos/train/shooting goal (soccer)/_dbcJuKJQNs_000040_000050.mkv", 1),
        ("videos/0000000000A_000000_000010.mp4", 0),
        ("videos/train/yoga/short_n-mbr_5_15.mp4", 2),
    ]
    assert rows(kinetics, "val") == [
        ("videos/val/val00000001_000100_000110.mp4", 0),
        ("videos/val/val00000002_000007_000017.mp4", 2),
    ]
    assert not (kinetics / "test.arrow").exists()
    said = capsys.readouterr().out
    assert "train.arrow: 4 of 5 clips, 4 h264, 1 MISSING (20.00%)" in said
    assert (
        "test.csv has no labels" in said
        and f"LEFT OUT: 1 clips, listed with reasons in {kinetics}/bad_files.csv" in said
    )
    assert (kinetics / "bad_files.csv").read_text().splitlines() == [
        "path,reason,split",
        f"videos/gone0000001_000012_000022.mp4,{kinetics}/videos/gone0000001_000012_000022.mp4: no such file,train",
    ]


def test_kinetics_test_list_with_labels(kinetics: Path) -> None:
    text(kinetics / "annotations" / "test.csv", KINETICS_HEADER, "yoga,test0000001,1,11,test,0")
    assert run("kinetics", "--root", kinetics) == 0
    assert rows(kinetics, "test") == [("videos/test/test0000001_000001_000011.mp4", 2)]


@pytest.mark.parametrize("folder", ["replacement", "k400_val/yoga", "train/abseiling", "."])
def test_kinetics_of_two_videos_takes_the_one_in_its_folder(kinetics: Path, a_clip: Path, folder: str) -> None:
    copies(a_clip, [kinetics / "videos" / folder / "-3B32lodo2M_000059_000069.mp4"])
    assert run("kinetics", "--root", kinetics) == 0
    assert rows(kinetics, "train")[0] == ("videos/train/yoga/-3B32lodo2M_000059_000069.mp4", 2)


def test_kinetics_two_videos_that_fit_alike(kinetics: Path, a_clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copies(a_clip, [kinetics / "videos" / "train" / "yoga" / "-3B32lodo2M_000059_000069.webm"])
    assert "train.csv, line 2: more than one video matches" in refused(capsys, "kinetics", "--root", kinetics)


def test_kinetics_too_many_are_missing(kinetics: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "kinetics", "--root", kinetics, "--max-missing", "0.1")
    assert "train: 1 of 5 clips do not exist, more than the limit of 10.00%" in message
    assert "gone0000001_000012_000022.mp4: no such file" in message and "--max-missing 0.2" in message
    assert "gone0000001" in (kinetics / "bad_files.csv").read_text()


def test_kinetics_all_are_missing(kinetics: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(kinetics / "videos" / "val")
    message = refused(capsys, "kinetics", "--root", kinetics, "--max-missing", "1")
    assert "val: 2 of 2 clips do not exist" in message and "Fix: check --videos" in message


KINETICS_ERRORS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no list": (lambda folder: (folder / "validate.csv").unlink(), "no CSV file whose name ends in val or validate"),
    "two lists": (lambda folder: text(folder / "val.csv", KINETICS_HEADER), "more than one list for val (val.csv, validate.csv)"),
    "no header": (
        lambda folder: text(folder / "train.csv", "yoga,a,1,2,train,0"),
        "train.csv, line 1: no column youtube_id, time_start",
    ),
    "a field missing": (
        lambda folder: text(folder / "train.csv", KINETICS_HEADER, "yoga,a,1"),
        "train.csv, line 2: a field is missing",
    ),
    "a broken time": (
        lambda folder: text(folder / "train.csv", KINETICS_HEADER, "yoga,a,1,x,train,0"),
        "train.csv, line 2: time_start '1' or time_end 'x' is no number of seconds",
    ),
    "an unknown class": (
        lambda folder: text(folder / "validate.csv", KINETICS_HEADER, "swimming,val00000001,100,110,val,0"),
        "validate.csv, line 2: the class 'swimming' is not in",
    ),
    "listed twice": (
        lambda folder: text(folder / "validate.csv", KINETICS_HEADER, "yoga,-3B32lodo2M,59,69,val,0"),
        "validate.csv, line 2: {root}/videos/train/yoga/-3B32lodo2M_000059_000069.mp4 was listed before, by {root}/anno",
    ),
    "an empty list": (lambda folder: text(folder / "validate.csv", KINETICS_HEADER), "no clip is annotated for the split val"),
    "not text": (lambda folder: (folder / "train.csv").write_bytes(b"label\xff\xfe"), "train.csv: not UTF-8 at byte 5"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", KINETICS_ERRORS)
def test_kinetics_wrong_annotations(kinetics: Path, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    do, message = KINETICS_ERRORS[wrong]
    do(kinetics / "annotations")
    assert message.format(root=kinetics) in refused(capsys, "kinetics", "--root", kinetics)


# --- Something-Something and Jester -----------------------------------------------------------------------------------

# In the order of the labels file, which is not sorted.
V1_CLASSES = ["Holding something", "Turning something upside down", "Closing something"]


@pytest.fixture
def something_v1(tmp_path: Path) -> Path:
    root = tmp_path / "v1"
    name = root / "annotations" / "something-something-v1-"
    text(Path(f"{name}labels.csv"), *V1_CLASSES)
    text(
        Path(f"{name}train.csv"),
        "100218;Holding something",
        "24413;Closing something",
        "3;Turning something upside down",
    )
    text(Path(f"{name}validation.csv"), "7;Closing something")
    text(Path(f"{name}test.csv"), "99", "98")
    for number, frames in (("100218", 5), ("24413", 3), ("3", 4), ("7", 2)):
        write_frames(root / "20bn-something-something-v1" / number, plain_video(frames))
    return root


def test_something_v1(something_v1: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("something-v1", "--root", something_v1) == 0
    assert classes(something_v1) == sorted(V1_CLASSES)
    folder = "20bn-something-something-v1"
    assert rows(something_v1, "train") == [
        (f"{folder}/100218/%05d.jpg", 1), (f"{folder}/24413/%05d.jpg", 0), (f"{folder}/3/%05d.jpg", 2)
    ]  # fmt: skip
    assert rows(something_v1, "val") == [(f"{folder}/7/%05d.jpg", 0)]
    row = Manifest.open(something_v1 / "train.arrow").row(0)
    files = sorted((something_v1 / folder / "100218").iterdir())
    assert (row.codec, row.num_frames, row.offset) == (JPEG_FRAMES, 5, 1)
    assert (row.width, row.height, row.rotation) == (48, 32, 0)
    assert row.length == sum(path.stat().st_size for path in files)
    said = capsys.readouterr().out
    assert "3 of 3 clips, 3 jpeg-frames" in said
    assert "no clip of the test list is in" in said and not (something_v1 / "test.arrow").exists()


def test_something_v1_with_its_test_clips(something_v1: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without labels, in the order of the list. A clip that is not there is missing, as in the other splits."""
    folder = "20bn-something-something-v1"
    write_frames(something_v1 / folder / "98", plain_video(3))
    message = refused(capsys, "something-v1", "--root", something_v1)
    assert "test: 1 of 2 clips do not exist, more than the limit of 0.00%" in message
    write_frames(something_v1 / folder / "99", plain_video(2))
    assert run("something-v1", "--root", something_v1) == 0
    assert rows(something_v1, "test") == [(f"{folder}/99/%05d.jpg", UNLABELLED), (f"{folder}/98/%05d.jpg", UNLABELLED)]
    manifest = Manifest.open(something_v1 / "test.arrow")
    assert not manifest.labelled and (manifest.split, manifest.classes) == ("test", sorted(V1_CLASSES))
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if "without labels" in line]
    assert "test.arrow: 2 of 2 clips, 2 jpeg-frames" in line


def test_something_v1_without_a_test_list(something_v1: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (something_v1 / "annotations" / "something-something-v1-test.csv").unlink()
    assert run("something-v1", "--root", something_v1) == 0
    assert "has no test list, so the test split gets no manifest" in capsys.readouterr().out


def test_something_v1_in_the_order_of_its_labels_file(something_v1: Path) -> None:
    assert run("something-v1", "--root", something_v1, "--class-order", "file") == 0
    assert classes(something_v1) == V1_CLASSES
    assert [label for _, label in rows(something_v1, "train")] == [0, 2, 1]


TWENTYBN_ERRORS = {
    "train.csv": (["1;Opening something"], "train.csv, line 1: the class 'Opening something' is not in"),
    "validation.csv": (["7"], "validation.csv, line 1: '7' is not `ID;class`"),
    "labels.csv": (["Closing something"] * 2, "labels.csv: the class 'Closing something' is listed twice"),
}


@pytest.mark.parametrize("file", TWENTYBN_ERRORS)
def test_something_v1_wrong_annotations(something_v1: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines, message = TWENTYBN_ERRORS[file]
    text(something_v1 / "annotations" / f"something-something-v1-{file}", *lines)
    assert message in refused(capsys, "something-v1", "--root", something_v1)


def test_a_clip_that_is_missing(something_v1: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fail on any missing clip: only Kinetics tolerates losses, and an unfinished copy must not shrink the data set."""
    shutil.rmtree(something_v1 / "20bn-something-something-v1" / "3")
    message = refused(capsys, "something-v1", "--root", something_v1)
    assert "train: 1 of 3 clips do not exist, more than the limit of 0.00%" in message and "/3: no such file" in message


def test_jester_with_answers_to_its_test(tmp_path: Path) -> None:
    """Read the newer form: file names without the data set's name, and labels of the test clips."""
    labels = text(tmp_path / "annotations" / "labels.csv", "Swiping Left", "Swiping Right", "No gesture").parent
    text(labels / "train.csv", "148092;Swiping Left", "11;No gesture")
    text(labels / "validation.csv", "12;Swiping Right")
    text(labels / "test.csv", "13")
    text(labels / "test-answers.csv", "13;Swiping Left")
    for number in (148092, 11, 12, 13):
        write_frames(tmp_path / "20bn-jester-v1" / str(number), plain_video(2))
    assert run("jester", "--root", tmp_path) == 0
    assert classes(tmp_path) == ["No gesture", "Swiping Left", "Swiping Right"]
    found = {split: rows(tmp_path, split) for split in ("train", "val", "test")}
    assert found == {
        "train": [("20bn-jester-v1/148092/%05d.jpg", 1), ("20bn-jester-v1/11/%05d.jpg", 0)],
        "val": [("20bn-jester-v1/12/%05d.jpg", 2)],
        "test": [("20bn-jester-v1/13/%05d.jpg", 1)],
    }


V2_LABELS = {
    "Moving something up": "1",
    "Approaching something with your camera": "0",
    "Putting something onto something": "2",
}


@pytest.fixture
def something_v2(tmp_path: Path, a_webm: Path, a_clip: Path) -> Path:
    root, name = tmp_path / "v2", "something-something-v2-"

    def entry(number: str, template: str) -> dict[str, object]:
        label = template.replace("[something]", "a cup")
        return {"id": number, "label": label, "template": template, "placeholders": ["a cup"]}

    lists = {
        "train": [entry("78687", "Putting [something] onto [something]"), entry("42326", "Moving [something] up")],
        "validation": [entry("74225", "Approaching [something] with your camera")],
        "test": [{"id": "1420"}],
        "labels": V2_LABELS,
    }
    for list_name, content in lists.items():
        text(root / "annotations" / f"{name}{list_name}.json", json.dumps(content))
    videos = root / "20bn-something-something-v2"
    copies(a_webm, [videos / "78687.webm", videos / "1420.webm"])
    copies(a_clip, [videos / "42326.mp4"])
    write_frames(videos / "74225", plain_video(3), name="%06d.jpg")
    return root


def test_something_v2(something_v2: Path) -> None:
    """Read videos of both kinds, and frames from the official tool, in one folder."""
    assert run("something-v2", "--root", something_v2) == 0
    assert classes(something_v2) == sorted(V2_LABELS, key=lambda name: int(V2_LABELS[name]))
    folder = "20bn-something-something-v2"
    assert rows(something_v2, "train") == [(f"{folder}/78687.webm", 2), (f"{folder}/42326.mp4", 1)]
    assert rows(something_v2, "val") == [(f"{folder}/74225/%06d.jpg", 0)]
    assert Manifest.open(something_v2 / "train.arrow").row(0).codec == "vp9"
    assert rows(something_v2, "test") == [(f"{folder}/1420.webm", UNLABELLED)]


def test_something_v2_with_answers_to_its_test(something_v2: Path) -> None:
    text(something_v2 / "annotations" / "test-answers.csv", "1420;Moving something up")
    assert run("something-v2", "--root", something_v2) == 0
    assert rows(something_v2, "test") == [("20bn-something-something-v2/1420.webm", 1)]


V2_ERRORS = {
    "a cut list": ("train", '[{"id": "1", ', "train.json, line 2: not JSON"),
    "another file": ("train", "{}", "train.json: holds a dict, not a list"),
    "no template": ("train", '[{"id": "1"}]', "train.json, entry 1: has no id or no template"),
    "an unknown class": ("train", '[{"id": "1", "template": "Moving [x] down"}]', "entry 1: the class 'Moving x down' is not"),
    "a test clip without ID": ("test", '[{"number": 1}]', "test.json, entry 1: has no id"),
    "labels that skip a number": ("labels", '{"a": "0", "b": "2"}', "2 classes that are not numbered 0 to 1"),
    "a label that is no number": ("labels", '{"a": "first"}', "a class's number is no number"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", V2_ERRORS)
def test_something_v2_wrong_annotations(something_v2: Path, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    file, content, message = V2_ERRORS[wrong]
    text(something_v2 / "annotations" / f"something-something-v2-{file}.json", content)
    assert message in refused(capsys, "something-v2", "--root", something_v2)


# --- UCF101 and HMDB51 ------------------------------------------------------------------------------------------------


@pytest.fixture
def ucf101(tmp_path: Path, an_avi: Path) -> Path:
    root = tmp_path / "ucf101"
    lists = root / "ucfTrainTestlist"
    text(lists / "classInd.txt", "1 ApplyEyeMakeup", "2 HandstandPushups", "3 Archery")
    text(
        lists / "trainlist02.txt",
        "Archery/v_Archery_g08_c01.avi 3",
        "HandstandPushups/v_HandStandPushups_g08_c01.avi 2",
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c02.avi 1",
    )
    text(lists / "testlist02.txt", "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi", "Archery/v_Archery_g01_c01.avi")
    names = [
        line.split()[0] for file in ("train", "test") for line in (lists / f"{file}list02.txt").read_text().splitlines()
    ]
    copies(an_avi, [root / "UCF-101" / name for name in names])
    return root


def test_ucf101(ucf101: Path) -> None:
    assert run("ucf101", "--root", ucf101, "--split", "2") == 0
    assert classes(ucf101) == ["ApplyEyeMakeup", "HandstandPushups", "Archery"]
    assert rows(ucf101, "train") == [
        ("UCF-101/Archery/v_Archery_g08_c01.avi", 2),
        ("UCF-101/HandstandPushups/v_HandStandPushups_g08_c01.avi", 1),
        ("UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c02.avi", 0),
    ]
    assert rows(ucf101, "val") == [
        ("UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi", 0),
        ("UCF-101/Archery/v_Archery_g01_c01.avi", 2),
    ]


UCF_ERRORS = {
    "another split": ("", [], "has no trainlist01.txt"),
    "a number that is not the class's": ("trainlist01.txt", ["Archery/a.avi 2"], "line 1: 2 is not the number of Archery, 3,"),
    "an unknown class": ("trainlist01.txt", ["Swimming/a.avi 2"], "line 1: the class 'Swimming' is not in"),
    "classes out of order": ("classInd.txt", ["1 Archery", "3 Swimming"], "classInd.txt, line 2: '3 Swimming' is not `2 CLASS`"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", UCF_ERRORS)
def test_ucf101_wrong_annotations(ucf101: Path, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    file, lines, message = UCF_ERRORS[wrong]
    if file:
        text(ucf101 / "ucfTrainTestlist" / file, *lines)
    assert message in refused(capsys, "ucf101", "--root", ucf101)


def test_hmdb51(tmp_path: Path, an_avi: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lists = tmp_path / "testTrainMulti_7030_splits"
    text(
        lists / "wave_test_split1.txt", "20060723sfjffbartsinger_wave_f_cm_np1_ba_med_0.avi 1 ", "#1_wave_(a)&b.avi 2 "
    )
    text(lists / "brush_hair_test_split1.txt", "April_09_brush_hair_u_nm_np1_ba_goo_0.avi 1 ", "unused.avi 0 ")
    text(lists / "wave_test_split2.txt", "#1_wave_(a)&b.avi 1")
    videos = tmp_path / "hmdb51_org"
    copies(
        an_avi,
        [
            videos / "wave" / "20060723sfjffbartsinger_wave_f_cm_np1_ba_med_0.avi",
            videos / "wave" / "#1_wave_(a)&b.avi",
            videos / "brush_hair" / "April_09_brush_hair_u_nm_np1_ba_goo_0.avi",
        ],
    )
    assert run("hmdb51", "--root", tmp_path) == 0
    assert classes(tmp_path) == ["brush_hair", "wave"]
    assert rows(tmp_path, "train") == [
        ("hmdb51_org/brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0.avi", 0),
        ("hmdb51_org/wave/20060723sfjffbartsinger_wave_f_cm_np1_ba_med_0.avi", 1),
    ]
    assert rows(tmp_path, "val") == [("hmdb51_org/wave/#1_wave_(a)&b.avi", 1)]
    capsys.readouterr()
    text(lists / "wave_test_split1.txt", "a.avi 3")
    assert run("hmdb51", "--root", tmp_path) == 2
    assert "wave_test_split1.txt, line 1: 'a.avi 3' is not a file name and 0, 1 or 2" in capsys.readouterr().err


# --- Lists ------------------------------------------------------------------------------------------------------------

LISTS = {
    "spaces": ["abseil/a.mp4 0", '"dance ballet/b 2.mp4" 1', "abseil/frames 0"],
    "comma": ["abseil/a.mp4,0", "dance ballet/b 2.mp4,1", "abseil/frames,0"],
    "tab and names": ["abseil/a.mp4\tabseil", "dance ballet/b 2.mp4\tdance ballet", "abseil/frames\tabseil"],
    "semicolon and frames": ["abseil/a.mp4;4;0", "dance ballet/b 2.mp4;4;1", "abseil/frames;3;0"],
    "official TSM": ["abseil/a.mp4 4 0", '"dance ballet/b 2.mp4" 4 1', "abseil/frames 3 0"],
}


@pytest.fixture
def listed(tmp_path: Path, a_clip: Path) -> Path:
    copies(a_clip, [tmp_path / "abseil/a.mp4", tmp_path / "dance ballet/b 2.mp4", tmp_path / "v.mp4"])
    write_frames(tmp_path / "abseil/frames", plain_video(3), name="img_%05d.jpg")
    write_frames(tmp_path / "abseil/frames", plain_video(3), name="flow_x_%05d.jpg")
    text(tmp_path / "classes.txt", "abseil", "dance ballet")
    text(tmp_path / "val.txt", "v.mp4 1")
    return tmp_path


def list_arguments(root: Path) -> list[object]:
    files = [argument for name in ("train", "val", "classes") for argument in (f"--{name}", root / f"{name}.txt")]
    return ["list", "--root", root, *files]


@pytest.mark.parametrize("form", LISTS)
def test_lists(listed: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    text(listed / "train.txt", *LISTS[form])
    assert run(*list_arguments(listed)) == 0
    assert classes(listed) == ["abseil", "dance ballet"]
    assert rows(listed, "train") == [
        ("abseil/a.mp4", 0),
        ("dance ballet/b 2.mp4", 1),
        ("abseil/frames/img_%05d.jpg", 0),
    ]
    assert rows(listed, "val") == [("v.mp4", 1)]
    assert "NOTE" not in capsys.readouterr().out


def test_a_list_is_corrected_about_frames_and_says_so(listed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text(listed / "train.txt", "abseil/a.mp4 4 0", "abseil/frames 5 0")
    # `frames` is another name of the same command.
    assert run("frames", *list_arguments(listed)[1:]) == 0
    assert Manifest.open(listed / "train.arrow").row(1).num_frames == 3
    assert "NOTE: 1 train clips hold another number of frames" in (said := capsys.readouterr().out)
    assert "train.txt, line 2: 5 frames listed, but abseil/frames has 3" in said


def test_a_test_list_may_repeat_the_validation_clips(listed: Path) -> None:
    text(listed / "train.txt", "abseil/a.mp4 0")
    assert run(*list_arguments(listed), "--test", listed / "val.txt") == 0
    assert rows(listed, "test") == rows(listed, "val")


@pytest.mark.parametrize("options", [[], ["--delimiter", "space"]])
def test_a_test_list_of_paths_only_has_no_labels(listed: Path, options: list[object]) -> None:
    text(listed / "train.txt", "abseil/a.mp4 0")
    test = text(listed / "test.txt", "v.mp4", '"dance ballet/b 2.mp4"')
    assert run(*list_arguments(listed), "--test", test, *options) == 0
    assert rows(listed, "test") == [("v.mp4", UNLABELLED), ("dance ballet/b 2.mp4", UNLABELLED)]


def test_a_list_of_training_clips_needs_labels(listed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text(listed / "train.txt", "abseil/a.mp4")
    assert "train.txt: no delimiter splits its first 1 lines" in refused(capsys, *list_arguments(listed))
    text(listed / "train.txt", "abseil/a.mp4 0")
    test = text(listed / "test.txt", "v.mp4", "abseil/frames 0")
    assert "test.txt: no delimiter splits" in refused(capsys, *list_arguments(listed), "--test", test)


names = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"]), min_size=1)
paths = st.lists(names, min_size=1, max_size=3).map(" ".join).filter(lambda path: path.strip(".") != "")


@settings(max_examples=60)
@given(
    paths=st.lists(paths, min_size=1, max_size=8, unique=True),
    delimiter=st.sampled_from([",", ";", "\t", " "]),
    frames=st.booleans(),
    data=st.data(),
)
def test_any_path_can_be_listed(
    tmp_path_factory: pytest.TempPathFactory, paths: list[str], delimiter: str, frames: bool, data: st.DataObject
) -> None:
    """Read back what a CSV writer writes, with any paths, and detect the delimiter where it is unambiguous."""
    labels = data.draw(st.lists(st.integers(0, 2), min_size=len(paths), max_size=len(paths)))
    folder = tmp_path_factory.mktemp("list")
    with open(folder / "train.txt", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\r\n", quoting=csv.QUOTE_ALL)
        writer.writerows([path, *([7] if frames else []), label] for path, label in zip(paths, labels, strict=True))
    names_file = text(folder / "classes.txt", "a", "b", "c")
    delimiter_name = {",": "comma", ";": "semicolon", "\t": "tab", " ": "space"}[delimiter]
    for given_name in (delimiter_name, None):
        clips = read_lists({"train": folder / "train.txt"}, names_file, Path("videos"), given_name).splits["train"]
        assert [clip.path for clip in clips] == [Path("videos") / path for path in paths]
        assert [clip.label for clip in clips] == labels
        assert {clip.listed_frames for clip in clips} == {7 if frames else None}


LIST_ERRORS = {
    "no common number of fields": (["a b.mp4 0", "c.mp4 1"], "no delimiter splits its first 2 lines"),
    "label too large": (["a.mp4 0", "c.mp4 2"], "train.txt, line 2: the label 2 is outside of 0 to 1"),
    "label below 0": (["a.mp4 -1"], "train.txt, line 1: the label -1 is outside of 0 to 1"),
    "unknown class": (["a.mp4,swim"], "train.txt, line 1: the class 'swim' is not in"),
    "no number of frames": (["a.mp4 many 0"], "train.txt, line 1: 'many' is no number of frames"),
    "an open quote": (['"a.mp4 0'], "no delimiter splits"),
    "a later line": (["a.mp4 0"] * 100 + ["b.mp4 1 2 3"], "train.txt, line 101: 4 fields"),
    "empty": ([], "train.txt: the list is empty"),
    "twice": (
        ["a.mp4 0", "./a.mp4 1"],
        "train.txt, line 2: {root}/a.mp4 was listed before, by {root}/train.txt, line 1",
    ),
    "in validation too": (["v.mp4 0"], "val.txt, line 1: {root}/v.mp4 was listed before, by {root}/train.txt, line 1"),
}


@pytest.mark.parametrize("wrong", LIST_ERRORS)
def test_wrong_lists(listed: Path, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines, message = LIST_ERRORS[wrong]
    text(listed / "train.txt", *lines)
    assert message.format(root=listed) in refused(capsys, *list_arguments(listed))


def test_a_list_that_is_not_there(listed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "train.txt: cannot be read (No such file" in refused(capsys, *list_arguments(listed))


def test_a_delimiter_can_be_given(listed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Accept --delimiter where each line could also be split at the comma."""
    copies(listed / "v.mp4", [listed / "w,1.mp4"])
    text(listed / "train.txt", "w,1.mp4 1")
    assert "the class '1.mp4 1' is not in" in refused(capsys, *list_arguments(listed))
    text(listed / "val.txt", "v.mp4 1")
    assert run(*list_arguments(listed), "--delimiter", "space") == 0
    assert rows(listed, "train") == [("w,1.mp4", 1)]


# --- Folders ----------------------------------------------------------------------------------------------------------


def test_folders_of_splits(tmp_path: Path, a_clip: Path, an_avi: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copies(a_clip, [tmp_path / "train/wave/b.mp4", tmp_path / "train/wave/a.MP4", tmp_path / "val/wave/c.mp4"])
    copies(an_avi, [tmp_path / "train/jump/z.avi", tmp_path / "test/jump/t.avi"])
    write_frames(tmp_path / "train/jump/frames", plain_video(3), first=0)
    text(tmp_path / "train/jump/notes.txt", "not a clip")
    text(tmp_path / "train/jump/.hidden.mp4", "not a clip")
    assert run("folder", "--root", tmp_path) == 0
    assert classes(tmp_path) == ["jump", "wave"]
    assert rows(tmp_path, "train") == [
        ("train/jump/frames/%05d.jpg", 0), ("train/jump/z.avi", 0), ("train/wave/a.MP4", 1), ("train/wave/b.mp4", 1)
    ]  # fmt: skip
    assert Manifest.open(tmp_path / "train.arrow").row(0).offset == 0
    assert (rows(tmp_path, "val"), rows(tmp_path, "test")) == ([("val/wave/c.mp4", 1)], [("test/jump/t.avi", 0)])
    assert "1 files skipped" in capsys.readouterr().out


@pytest.fixture
def class_folders(tmp_path: Path, a_clip: Path) -> Path:
    copies(a_clip, [tmp_path / "mine" / name / f"{number}.mp4" for name in ("jump", "wave") for number in range(20)])
    return tmp_path / "mine"


def test_a_part_is_held_out_by_name(class_folders: Path, a_clip: Path) -> None:
    arguments = ["folder", "--root", class_folders, "--val-fraction", "0.3"]
    assert run(*arguments) == 0
    first = {split: set(rows(class_folders, split)) for split in ("train", "val")}
    assert len(first["train"]) + len(first["val"]) == 40 and not first["train"] & first["val"]
    # The expected count is 12; the limits are about four standard deviations away.
    assert 4 <= len(first["val"]) <= 20
    copies(a_clip, [class_folders / "jump" / f"new{number}.mp4" for number in range(10)])
    assert run(*arguments) == 0
    # No clip has changed its split.
    for split in first:
        assert first[split] <= set(rows(class_folders, split))
    assert run(*arguments, "--seed", "1") == 0
    assert first["val"] - set(rows(class_folders, "val"))


FOLDER_ERRORS: list[tuple[list[object], str]] = [
    ([], "has no folders train and val. Fix: give --val-fraction 0.1"),
    (["--val-fraction", "1.5"], "--val-fraction is 1.5. Fix: give a number between 0 and 1"),
    (["--val-fraction", "0.0001"], "no clip is annotated for the split val"),
    (
        ["--videos", "nowhere", "--val-fraction", "0.1"],
        "nowhere: no such folder. Fix: give the folder of the clips with --videos",
    ),
    (["--val-fraction", "0.3", "--max-bad", "5"], "--max-bad is 5.0. Fix: give a fraction from 0 to 1"),
]


@pytest.mark.parametrize(("arguments", "message"), FOLDER_ERRORS)
def test_wrong_folders(
    class_folders: Path, arguments: list[object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, "folder", "--root", class_folders, *arguments)


def test_a_class_that_is_only_in_validation(tmp_path: Path, a_clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copies(a_clip, [tmp_path / "train/wave/a.mp4", tmp_path / "val/waves/c.mp4"])
    assert "val/waves/c.mp4: the class 'waves' is not in" in refused(capsys, "folder", "--root", tmp_path)


def test_the_job_opens_these_manifests(something_v1: Path) -> None:
    from training.build.data import open_manifest
    from training.config.schema import Config, DataConfig
    from training.errors import DataError

    assert run("something-v1", "--root", something_v1) == 0
    config = Config(data=DataConfig(name="something_v1", root=str(something_v1), num_classes=3))
    assert np.bincount(open_manifest(config.data, "train").labels()).tolist() == [1, 1, 1]
    config.data.num_classes = 174
    with pytest.raises(DataError, match=r"has 3 classes, but data.num_classes=174"):
        open_manifest(config.data, "train")
