"""Scan folders of optical flow: official names, and what is wrong with a folder, by name."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prepare
from pipelines.errors import BadClip
from pipelines.jpeg_clips import JPEG_COLOURS, JPEG_FLOW, JPEG_FLOW_RG
from pipelines.manifest import Manifest, ManifestError, ManifestRow, image_file, write_manifest
from pipelines.prepare.scan.flow_folders import find_flow, scan_flow
from pipelines.prepare.scan.frame_folders import FrameSeries, find_frames
from pipelines.prepare.scan.scan_clip import ClipFacts
from tests.helpers.clips import smooth_flow, smooth_video, write_flow, write_frames


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def pairs(pattern: str, numbers: range) -> list[str]:
    return [pattern.format(component, number) for number in numbers for component in "xy"]


@pytest.mark.parametrize(
    ("names", "series"),
    [
        (pairs("flow_{}_{:05d}.jpg", range(1, 4)), FrameSeries("flow_{xy}_%05d.jpg", 1, 3)),
        (pairs("000001-{}_{:05d}.jpg", range(1, 13)), FrameSeries("000001-{xy}_%05d.jpg", 1, 12)),
        (pairs("{}_{:04d}.JPG", range(0, 2)), FrameSeries("{xy}_%04d.JPG", 0, 2)),
        (pairs("50%_{}_{:d}.jpg", range(1, 12)), FrameSeries("50%%_{xy}_%d.jpg", 1, 11)),
    ],
)
def test_names(tmp_path: Path, names: list[str], series: FrameSeries) -> None:
    """Find the flow beside the frames, and the frames beside the flow."""
    touch(tmp_path, *names, "img_00001.jpg", "img_00002.jpg", "notes.txt")
    assert find_flow(tmp_path, JPEG_FLOW) == series
    row = ManifestRow(f"a/{series.pattern}", series.first, 1, 0, series.count, JPEG_FLOW, 1, 1, 0)
    found = [image_file(Path(row.path), row, image).name for image in range(row.num_images)]
    assert found == names and row.images_of(1) == range(2, 4)
    if names[0].startswith("flow_"):
        assert find_frames(tmp_path) == FrameSeries("img_%05d.jpg", 1, 2)


WRONG = {
    "no y": (["flow_y_00002.jpg"], [], "flow_y_00002.jpg is missing, while flow_x_00002.jpg is there"),
    "no x": (["flow_x_00004.jpg"], [], "flow_x_00004.jpg is missing, while flow_y_00004.jpg is there"),
    "no pair": (["flow_x_00002.jpg", "flow_y_00002.jpg"], [], "flow field 2 is missing: there is no flow_x_00002.jpg"),
    "late": (pairs("flow_{}_{:05d}.jpg", range(1, 3)), [], "flow field 1 is missing: the first file is flow_x_00003.jpg"),
    "two series": ([], ["000001-x_00001.jpg"], "two series of optical flow: 000001-x_00001.jpg and flow_x_00001.jpg"),
    "none": (pairs("flow_{}_{:05d}.jpg", range(1, 5)), ["00001.jpg"], "no optical flow: no JPEG file with x or y"),
}  # fmt: skip


@pytest.mark.parametrize(("without", "more", "message"), WRONG.values(), ids=WRONG)
def test_wrong_folders(tmp_path: Path, without: list[str], more: list[str], message: str) -> None:
    touch(tmp_path, *[name for name in pairs("flow_{}_{:05d}.jpg", range(1, 5)) if name not in without], *more)
    with pytest.raises(BadClip, match=message):
        find_flow(tmp_path, JPEG_FLOW)


@pytest.mark.parametrize(("codec", "name"), [(JPEG_FLOW, "flow_{xy}_%05d.jpg"), (JPEG_FLOW_RG, "%06d.jpg")])
def test_scan(tmp_path: Path, codec: str, name: str) -> None:
    write_flow(tmp_path, smooth_flow(6, 32, 48), name)
    series, facts = scan_flow(tmp_path, codec)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert (series, facts) == (FrameSeries(name, 1, 6), ClipFacts(size, 6, codec, 48, 32, 0, *JPEG_COLOURS))
    changed = max(tmp_path.iterdir())
    Image.new("L", (48, 34)).save(changed)
    with pytest.raises(BadClip, match=f"{changed.name} is 48x34, the first frame 48x32"):
        scan_flow(tmp_path, codec)
    changed.write_bytes(b"no JPEG")
    with pytest.raises(BadClip, match=f"{changed.name}: not a JPEG file"):
        scan_flow(tmp_path, codec)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Something-Something v1's flow as handed out: folders of six digits, lists without, which count images."""
    for number in (1, 2, 30):
        flow_F2HW = smooth_flow(6, 32, 48, seed=number)
        write_flow(tmp_path / "flow" / f"{number:06d}", flow_F2HW, f"{number:06d}-{{xy}}_%05d.jpg")
    (tmp_path / "train.txt").write_text("1 12 0\n30 12 1\n")
    (tmp_path / "val.txt").write_text("2 6 1\n")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    return tmp_path


def prepare_list(root: Path, *options: str) -> int:
    lists = [f"--{name}={root / name}.txt" for name in ("train", "val", "classes")]
    return prepare.main(["list", f"--root={root}", f"--videos={root / 'flow'}", "--workers=0", *lists, *options])


def test_official_lists(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare_list(root, "--flow", "xy") == 0
    printed = capsys.readouterr().out
    assert "2 of 2 clips, 2 jpeg-flow" in printed and "NOTE" not in printed
    train = Manifest.open(root / "train.arrow")
    assert train.modalities() == {"flow"} and train.fast_seek() == (0, 0, 0)
    row = train.row(1)
    assert row.path == "flow/000030/000030-{xy}_%05d.jpg"
    assert (row.codec, row.num_frames, row.offset, row.width, row.height) == (JPEG_FLOW, 6, 1, 48, 32)
    # Again, without a scan; then one clip that has changed.
    assert prepare_list(root, "--flow", "xy") == 0
    assert "2 reused from an earlier scan" in capsys.readouterr().out
    (root / "flow" / "000030" / "000030-y_00004.jpg").unlink()
    assert prepare_list(root, "--flow", "xy", "--max-bad", "0.5") == 0
    assert "000030-y_00004.jpg is missing, while 000030-x_00004.jpg is there" in (root / "bad_files.csv").read_text()


def test_flow_does_not_replace_frames(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2, 30):
        write_frames(root / "flow" / f"{number}", smooth_video(7, seed=number))
    assert prepare_list(root) == 0
    before = (root / "train.arrow").read_bytes()
    assert prepare_list(root, "--flow", "xy") != 0
    message = capsys.readouterr().err
    assert "train.arrow has clips of rgb, and the new one would have clips of flow. Fix:" in message
    assert (root / "train.arrow").read_bytes() == before


def test_a_video_is_no_flow(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(root / "flow" / "000002")
    (root / "flow" / "2").write_bytes(b"a file")
    assert prepare_list(root, "--flow", "xy") != 0
    assert "val: 1 of 1 clips cannot be decoded" in capsys.readouterr().err
    assert "a file, and not a folder of optical flow" in (root / "bad_files.csv").read_text()


def test_flow_is_not_transcoded(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare_list(root, "--flow", "xy") == 0
    assert prepare.main(["transcode", f"--root={root}", f"--to={root / 'small'}", "--workers=0"]) != 0
    assert "its clips are optical flow, which is not transcoded. Fix: transcode the frames" in capsys.readouterr().err


def test_a_manifest_names_x_and_y(tmp_path: Path) -> None:
    """Refuse files of two images per flow field that could not be found; in a shard they have an index."""
    row = ManifestRow("1/%05d.jpg", 1, 10, 0, 5, JPEG_FLOW, 8, 8, 0)
    with pytest.raises(
        ManifestError, match=r"row 0 \(1/%05d.jpg\): a clip of jpeg-flow needs \{xy\} in its file names"
    ):
        write_manifest(tmp_path / "train.arrow", [row], ["a"])
    write_manifest(tmp_path / "train.arrow", [ManifestRow("s.tar", 512, 10, 0, 5, JPEG_FLOW, 8, 8, 0)], ["a"])
    assert Manifest.open(tmp_path / "train.arrow").row(0).num_images == 10
    assert np.array_equal(Manifest.open(tmp_path / "train.arrow").labels(), [0])
