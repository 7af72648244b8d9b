"""The name of a clip is the same for all its forms: video, frames, flow, shard and transcoded clip."""

from pathlib import Path

import pytest

from pipelines.clip_names import clip_name, clip_names
from pipelines.jpeg_clips import JPEG_FLOW, JPEG_FLOW_RG, JPEG_FRAMES
from pipelines.manifest import Manifest, ManifestRow, write_manifest


def named(folder: Path, *paths: str, codec: str = "h264", names: tuple[str, ...] = ()) -> list[str] | None:
    """Return the names of clips with these paths."""
    rows = [
        ManifestRow(path, 0, 10, 0, 8, codec, 64, 48, 0, name=names[number] if names else "")
        for number, path in enumerate(paths)
    ]
    write_manifest(folder / "a.arrow", rows, ["a"])
    return clip_names(Manifest.open(folder / "a.arrow"))


@pytest.mark.parametrize(
    ("codec", "pattern"),
    [
        ("vp9", "20bn-something-something-v2/{}.webm"),
        ("h264", "/store/videos/{}.mp4"),
        (JPEG_FRAMES, "20bn-something-something-v1/{}/%05d.jpg"),
        (JPEG_FRAMES, "../elsewhere/{}/img_%05d.jpg"),
        (JPEG_FLOW, "v1/{}/flow_{{xy}}_%05d.jpg"),
        (JPEG_FLOW, "v1-flow/{0:0>6}/{0:0>6}-{{xy}}_%05d.jpg"),
        (JPEG_FLOW_RG, "{}/%06d.jpg"),
    ],
)
def test_all_forms_of_a_clip_have_one_name(tmp_path: Path, codec: str, pattern: str) -> None:
    paths = [pattern.format(number) for number in ("7", "100218", "74225")]
    assert named(tmp_path, *paths, codec=codec) == ["7", "100218", "74225"]


def test_folders_below_the_common_one_are_part_of_the_name(tmp_path: Path) -> None:
    """Two classes may hold files of one name."""
    videos = named(tmp_path, "videos/val/yoga/a.b_1.mp4", "videos/val/archery/a.b_1.mkv")
    frames = named(tmp_path, "frames/yoga/a.b_1/%05d.jpg", "frames/archery/a.b_1/%05d.jpg", codec=JPEG_FRAMES)
    assert videos == frames == ["yoga/a.b_1", "archery/a.b_1"]


def test_leading_zeros_stay_where_they_tell_clips_apart(tmp_path: Path) -> None:
    assert named(tmp_path, "a/007.mp4", "a/8.mp4") == ["7", "8"]
    assert named(tmp_path, "a/007.mp4", "a/7.mp4") == ["007", "7"]
    assert named(tmp_path, "a/0.mp4", "a/00.webm") == ["0", "00"]


def test_a_single_clip(tmp_path: Path) -> None:
    assert named(tmp_path, "videos/val/yoga/a.mp4") == ["a"]


def test_shards_and_transcoded_clips_keep_their_names(tmp_path: Path) -> None:
    names = ("20bn-something-something-v1/7", "20bn-something-something-v1/000008")
    for paths in (("val-000000.tar", "val-000000.tar"), ("val/000000/000000000.mp4", "val/000000/000000001.mp4")):
        assert named(tmp_path, *paths, names=names) == ["7", "8"]
        # As older versions wrote them.
        assert named(tmp_path, *paths) is None


def test_the_name_in_a_row_wins() -> None:
    row = ManifestRow("flow/a/b/flow_{xy}_%05d.jpg", 1, 10, 0, 8, JPEG_FLOW, 64, 48, 0)
    assert clip_name(row) == "flow/a/b"
    assert clip_name(ManifestRow("val-000000.tar", 0, 10, 0, 8, "h264", 64, 48, 0, name="x/y")) == "x/y"
